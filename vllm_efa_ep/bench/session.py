"""A run from its plan to its files: starts or joins the ranks, shows progress, collects the results."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_efa_ep.bench import results
from vllm_efa_ep.bench.environment import environment, warnings_about
from vllm_efa_ep.bench.launch import run_local
from vllm_efa_ep.bench.plan import Plan
from vllm_efa_ep.bench.results import CellResult, Document

JSON_NAME = "bench.json"


def launched_from_outside() -> bool:
    """Return whether a launcher such as torchrun has started this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_worlds(
    plan: Plan,
    worlds: Sequence[int],
    starts: int,
    directory: Path,
    launch: Callable[[Plan, int], Iterable[CellResult]] = run_local,
) -> Document:
    """Measure the plan for every world size, each in ``starts`` sets of fresh processes.

    Args:
        plan: What to measure.
        worlds: World sizes.
        starts: How often each is started.
        directory: Where the results go, also those before an error.
        launch: Measures with a number of ranks; default: on this machine.

    Raises:
        ConfigurationError: A cell cannot be measured; nothing has been started.
        EfaEpError: A rank ended with an error.

    """
    for world in worlds:
        plan.check_world(world)
    with Session(plan, len(worlds) * starts, max(worlds), directory) as session:
        for start in range(starts):
            for world in worlds:
                session.add_all(launch(plan, world), start)
    return session.document


def run_as_rank(plan: Plan, directory: Path) -> Document | None:
    """Measure as one rank of a world that a launcher started; only rank 0 gets and writes a document."""
    from vllm_efa_ep.bench.member import measure_with_torch

    world = int(os.environ["WORLD_SIZE"])
    plan.check_world(world)
    if os.environ["RANK"] != "0":
        measure_with_torch(plan, _nobody)
        return None
    with Session(plan, 1, world, directory) as session:
        measure_with_torch(plan, lambda result: session.add_all([result], start=0))
    return session.document


class Session:
    """Collects results while a progress bar shows how far they are, and writes them at its end."""

    def __init__(self, plan: Plan, launches: int, ranks: int, directory: Path) -> None:
        """Expect the plan's cells ``launches`` times; ``ranks`` is the largest world."""
        self._path = directory / JSON_NAME
        described = environment()
        self.document: Document = {
            "schema": results.SCHEMA,
            "environment": described,
            "plan": json.loads(plan.to_json()),
            "results": [],
        }
        self._console = Console(stderr=True)
        for warning in warnings_about(described, ranks):
            self._console.print(f"[yellow]warning:[/] {warning}")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        cells = len(plan.hidden) * len(plan.dtypes) * len(plan.tokens) * launches
        self._task = self._progress.add_task("cells", total=cells)

    def __enter__(self) -> "Session":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the bar as it is, and write what was measured, also before an error."""
        self._progress.stop()
        if kind is None or self.document["results"]:
            results.write(self._path, self.document)
        if kind is not None and self.document["results"]:
            self._console.print(f"[yellow]warning:[/] {self._path} has the results so far")

    def add_all(self, found: Iterable[CellResult], start: int) -> None:
        """Take each result as it comes."""
        for result in found:
            self.document["results"].append({**result, "start": start})
            self._progress.advance(self._task)


def print_table(document: Document) -> None:
    """Print one line per cell and contestant."""
    table = Table(title="microseconds; round: slowest rank, dispatch and combine: over ranks")
    for heading in ("ranks", "nodes", "hidden", "dtype", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("who")
    for heading in ("round p50", "p99", "dispatch p50", "combine p50", "x ours", "tokens/s"):
        table.add_column(heading, justify="right")
    for result in document["results"]:
        cell = result["cell"]
        place = [
            str(cell["world"]),
            str(cell["world"] // cell["ranks_per_node"]),
            *(str(cell[name]) for name in ("hidden", "dtype", "tokens")),
        ]
        if "left_out" in result:
            table.add_row(*place, f"left out: {result['left_out']}")
            continue
        ours = result["contestants"]["ours"]["round_us"]["p50"]
        for name, entry in result["contestants"].items():
            table.add_row(
                *place,
                name,
                number(entry["round_us"]["p50"]),
                number(entry["round_us"]["p99"]),
                number(entry["dispatch_us"]["p50"]),
                number(entry["combine_us"]["p50"]),
                f"{entry['round_us']['p50'] / ours:.2f}",
                f"{entry['tokens_per_s']:.3g}",
            )
    Console(width=None if Console().is_terminal else 140).print(table)


def number(microseconds: float) -> str:
    """Format with three significant digits and no exponent."""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def _nobody(result: CellResult) -> None:
    """Takes no results: only rank 0 reports."""
