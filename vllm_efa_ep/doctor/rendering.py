"""A report as a table on a terminal."""

from collections import defaultdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_efa_ep.doctor.check import Outcome, Status
from vllm_efa_ep.doctor.examination import Report
from vllm_efa_ep.doctor.next_steps import next_steps

_STYLES = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "bold red",
    Status.NOT_APPLICABLE: "dim",
}


def render(report: Report, console: Console) -> None:
    """Print what was found, then why it matters and how to mend it, then what to do next."""
    table = Table(title=_title(report), title_justify="left", expand=False)
    for column in ("check", "result", "what was found"):
        table.add_column(column, overflow="fold")
    for outcome, where in _grouped(report):
        table.add_row(
            outcome.name,
            Text(outcome.status.value, _STYLES[outcome.status]),
            Text(f"{where}{outcome.result}"),
        )
    console.print(table)
    advised = set()
    for outcome, _ in _grouped(report):
        if outcome.status in (Status.WARNING, Status.FAILED) and outcome.name not in advised:
            advised.add(outcome.name)
            console.print(Text(f"\n{outcome.name}", _STYLES[outcome.status]))
            console.print(Text(f"  why: {outcome.why}"))
            console.print(Text(f"  fix: {outcome.fix}"))
    counts = {status: sum(each.status is status for each in report.outcomes) for status in Status}
    console.print(
        Text(
            f"\n{report.status.value}: {counts[Status.FAILED]} failed, {counts[Status.WARNING]} warnings, "
            f"{counts[Status.OK]} ok, {counts[Status.NOT_APPLICABLE]} not applicable",
            _STYLES[report.status],
        )
    )
    for step in next_steps(report):
        console.print(Text(f"next: {step}"))


def _title(report: Report) -> str:
    return f"vllm-efa-ep doctor on {', '.join(report.hosts)}"


def _grouped(report: Report) -> list[tuple[Outcome, str]]:
    """Return the outcomes, those that several nodes share as one, each with the nodes that it is about."""
    grouped = []
    for number in range(len(report.nodes[0])):
        holders: dict[tuple[Status, str], list[int]] = defaultdict(list)
        for node, outcomes in enumerate(report.nodes):
            holders[outcomes[number].status, outcomes[number].result].append(node)
        for nodes in holders.values():
            everywhere = len(nodes) == len(report.nodes)
            where = (
                "" if everywhere else f"on {', '.join(f'{node} ({report.hosts[node]})' for node in nodes)}: "
            )
            grouped.append((report.nodes[nodes[0]][number], where))
    return grouped + [(outcome, "") for outcome in report.cluster]
