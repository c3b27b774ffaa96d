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
        ratio: The measured ratio of a cell's medians.
        limit: Its bound.
        at_least: Whether the ratio must reach the limit, or may not exceed it.

    """

    text: str
    scene: str
    applies: Callable[[CellResult], bool]
    ratio: Callable[[CellResult], float]
    limit: float
    at_least: bool

    def judge(self, results: Iterable[CellResult]) -> str:
        """Return one line: met or not, how often, and the worst cell."""
        judged = [
            (self.ratio(result), result["cell"])
            for result in results
            if "contestants" in result
            and result["cell"]["scene"] == self.scene
            and self.applies(result["cell"])
        ]
        if not judged:
            return f"not measured  {self.text}"
        met = [ratio >= self.limit if self.at_least else ratio <= self.limit for ratio, _ in judged]
        pick = min if self.at_least else max
        worst, cell = pick(judged, key=lambda pair: pair[0])
        where = "{world} ranks, {tokens} x {hidden} {dtype}".format(**cell)
        verdict = "met    " if all(met) else "NOT met"
        reached = f"{sum(met)} of {len(met)} cells reach it"
        return f"{verdict} ({reached})  {self.text}; worst {worst:.2f}x ({where})"


def median(result: CellResult, name: str) -> float:
    """Return a contestant's median of a cell in microseconds."""
    return float(result["contestants"][name]["median_us"])


def times_faster_than(*peers: str) -> Callable[[CellResult], float]:
    """Return the ratio of the fastest of ``peers`` to this package."""
    return lambda result: min(median(result, peer) for peer in peers) / median(result, "ours")


def times_the_floor(floor: str) -> Callable[[CellResult], float]:
    """Return the ratio of this package to ``floor``."""
    return lambda result: median(result, "ours") / median(result, floor)


GOALS = (
    Goal(
        "same node, from 16 tokens on: 10x faster than all-gather/reduce-scatter",
        "same_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than("gloo_allgather"),
        10,
        at_least=True,
    ),
    Goal(
        "same node, from 16 tokens on: 3x faster than the better all-to-all",
        "same_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than("gloo_alltoall", "mpi_alltoallv"),
        3,
        at_least=True,
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
    ),
    Goal(
        "own node, from 16 tokens on: 2x faster than the best peer",
        "own_node",
        lambda cell: cell["tokens"] >= 16,
        times_faster_than(*PEERS),
        2,
        at_least=True,
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
