"""The project's speed goals, judged on measured cells."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CellResult = dict[str, Any]
PEERS = ("gloo_allgather", "gloo_alltoall", "mpi_alltoallv")


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of medians in every cell that it applies to.

    Attributes:
        text: The goal in words.
        scene: Cells of this scene only.
        applies: Whether it concerns a cell of the scene.
        ratio: The ratio of a cell's medians, for a contestant.
        limit: Its bound.
        at_least: Whether the ratio must reach the limit, or may not exceed it.
        floor: Whose ratio says what is within reach: in a cell where not even the bytes alone, copied or
            written, are fast enough, nobody who also routes, packs and sums them can be expected to be.

    """

    text: str
    scene: str
    applies: Callable[[CellResult], bool]
    ratio: Callable[[CellResult, str], float]
    limit: float
    at_least: bool
    floor: str | None = None

    def judge(self, results: Iterable[CellResult]) -> str:
        """Return one line: met or not, how often, how often the floor alone meets it, and the worst cell."""
        judged = [
            result
            for result in results
            if "contestants" in result
            and result["cell"]["scene"] == self.scene
            and self.applies(result["cell"])
        ]
        if not judged:
            return f"not measured  {self.text}"
        reached = self.cells_reached(judged, "ours")
        verdict = "met    " if reached == len(judged) else "NOT met"
        reach = f"{reached} of {len(judged)} cells reach it"
        if self.floor:
            reach += f"; {self.floor} alone in {self.cells_reached(judged, self.floor)}"
        pick = min if self.at_least else max
        worst = pick(judged, key=lambda result: self.ratio(result, "ours"))
        where = "{world} ranks, {tokens} x {hidden} {dtype}".format(**worst["cell"])
        return f"{verdict} ({reach})  {self.text}; worst {self.ratio(worst, 'ours'):.2f}x ({where})"

    def cells_reached(self, results: Iterable[CellResult], contestant: str) -> int:
        """Return in how many cells a contestant reaches the goal."""
        ratios = [self.ratio(result, contestant) for result in results]
        return sum(ratio >= self.limit if self.at_least else ratio <= self.limit for ratio in ratios)


def median(result: CellResult, name: str) -> float:
    """Return a contestant's median of a cell in microseconds."""
    return float(result["contestants"][name]["median_us"])


def times_faster_than(*peers: str) -> Callable[[CellResult, str], float]:
    """Return the ratio of the fastest of ``peers`` to a contestant."""
    return lambda result, name: min(median(result, peer) for peer in peers) / median(result, name)


def times_the_floor(floor: str) -> Callable[[CellResult, str], float]:
    """Return the ratio of a contestant to ``floor``."""
    return lambda result, name: median(result, name) / median(result, floor)


GOALS = (
    Goal(
        "same node, from 16 tokens on: 10x faster than all-gather/reduce-scatter",
        "same_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than("gloo_allgather"),
        10,
        at_least=True,
        floor="memcpy",
    ),
    Goal(
        "same node, from 16 tokens on: 3x faster than the better all-to-all",
        "same_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than("gloo_alltoall", "mpi_alltoallv"),
        3,
        at_least=True,
        floor="memcpy",
    ),
    Goal(
        "same node, from 128 x 7168 elements on: within 4x of the memcpy floor",
        "same_node",
        lambda cell: cell["tokens"] * cell["hidden"] >= 128 * 7168,
        times_the_floor("memcpy"),
        4,
        at_least=False,
    ),
    Goal(
        "own node, every size: faster than the best peer",
        "own_node",
        lambda cell: cell["tokens"] >= 1,
        times_faster_than(*PEERS),
        1,
        at_least=True,
        floor="bare_writes",
    ),
    Goal(
        "own node, from 16 tokens on: 2x faster than the best peer",
        "own_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than(*PEERS),
        2,
        at_least=True,
        floor="bare_writes",
    ),
    Goal(
        "own node, from 128 tokens on: within 1.5x of the bare-write floor",
        "own_node",
        lambda cell: cell["tokens"] >= 128,
        times_the_floor("bare_writes"),
        1.5,
        at_least=False,
    ),
)
