"""The Grafana dashboard: accepted by Grafana's schema, and every query asks for what exists."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from vllm_efa_ep.metrics.registry import METRICS, NIC_LABELS, NIC_METRICS, RANK_LABELS

DIRECTORY = Path(__file__).parents[2] / "examples" / "grafana"
TEXT = (DIRECTORY / "efa_ep.json").read_text()
DASHBOARD: dict[str, Any] = json.loads(TEXT)
# What Prometheus adds to every sample and to the buckets of a histogram.
ADDED_LABELS = {"instance", "job", "le"}
LABELS = {
    name: {*(NIC_LABELS if metric in NIC_METRICS else RANK_LABELS), *metric.labels, *ADDED_LABELS}
    for metric in METRICS
    for name in metric.sample_names
}


def panels() -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Return every query, with Grafana's variables as Prometheus would get them."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m") for query in found]


def nodes(expression: Any) -> Iterator[Any]:
    """Yield every node of a parsed query."""
    yield expression
    for name in ("expr", "lhs", "rhs", "args", "vector_selector"):
        child = getattr(expression, name, None)
        for each in child if isinstance(child, list) else [child]:
            if each is not None and not isinstance(each, str | int | float):
                yield from nodes(each)


def test_the_schema_accepts_it() -> None:
    """Grafana's own model of a dashboard reads it, and loses nothing: no field is unknown or misplaced."""
    plugins.register_default_plugins()
    read = Dashboard.from_json(DASHBOARD)
    assert json.loads(JSONEncoder().encode(read)) == DASHBOARD
    assert len(panels()) >= 12


def test_it_is_what_its_script_makes() -> None:
    """Nobody edits the JSON by hand."""
    spec = importlib.util.spec_from_file_location("dashboard", DIRECTORY / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert json.loads(JSONEncoder().encode(script.build().build())) == DASHBOARD


def test_every_panel_explains_itself() -> None:
    """A title, a description and a query each."""
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["targets"]


@pytest.mark.parametrize("query", queries())
def test_every_query_asks_for_what_exists(query: str) -> None:
    """It is PromQL, its metrics are in the registry, and so are the labels it selects and groups by."""
    expression = promql_parser.parse(query)
    selectors = [node for node in nodes(expression) if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    for selector in selectors:
        assert selector.name in LABELS
        selected = {matcher.name for matcher in selector.matchers.matchers}
        assert selected <= LABELS[selector.name]
    for group in re.findall(r"by \(([^)]*)\)", query):
        wanted = {label.strip() for label in group.split(",")}
        assert all(wanted <= LABELS[selector.name] for selector in selectors)


def test_the_variables_ask_for_what_exists() -> None:
    """The choices of ranks and layouts come from labels of a metric of ours."""
    asked = [
        re.fullmatch(r"label_values\((\w+), (\w+)\)", each["query"])
        for each in DASHBOARD["templating"]["list"]
        if each["type"] == "query"
    ]
    assert len(asked) == 2
    for match in asked:
        assert match is not None
        assert match[2] in LABELS[match[1]]
