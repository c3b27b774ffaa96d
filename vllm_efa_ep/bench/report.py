"""The HTML report of a run: one file, nothing loaded from elsewhere, no script."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from vllm_efa_ep.bench.environment import warnings_about
from vllm_efa_ep.bench.results import Document, measured
from vllm_efa_ep.errors import ConfigurationError

_TITLES = {
    "latency-tokens": "Latency against tokens",
    "latency-world": "Latency against ranks",
    "breakdown": "Breakdown per half",
    "work-requests": "Work requests",
    "wire-bytes": "Wire bytes against the floor",
}


def write_report(document: Document, path: Path) -> None:
    """Write the report.

    Raises:
        ConfigurationError: matplotlib is not installed, or no cell was measured.

    """
    path.write_text(report(document), encoding="utf-8")


def report(document: Document) -> str:
    """Return the report; raises as ``write_report``."""
    try:
        from vllm_efa_ep.bench.plots import LABELS, plots
    except ImportError as error:
        raise ConfigurationError(
            f"the report draws with matplotlib ({error}); pip install 'vllm-efa-ep[bench]'"
        ) from error
    results = measured(document["results"])
    if not results:
        raise ConfigurationError("no cell was measured, so there is nothing to report")
    template = files("vllm_efa_ep.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    first_start = [result for result in results if result["start"] == results[0]["start"]]
    return (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            environment=document["environment"],
            warnings=warnings_about(
                document["environment"], max(result["cell"]["world"] for result in results)
            ),
            plots=[{"title": _TITLES[plot.name], **plot._asdict()} for plot in plots(first_start)],
            results=results,
            labels=LABELS,
            facts=list(_facts(document)),
        )
    )


def _facts(document: Document) -> Iterator[tuple[str, str]]:
    """Yield the environment as (name, value), what the network turned out to be first."""
    ours = measured(document["results"])[0]
    network = ours["contestants"]["ours"]["environment"]
    for name, value in network.items():
        yield name, str(value) or "none: one node"
    yield "barrier", ours["barrier"]
    yield from _flat(document["environment"], "")
    yield from _flat(document["plan"], "plan.")


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
