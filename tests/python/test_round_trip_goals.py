"""The verdicts of the round trip's benchmark, on medians that were made up."""

from typing import Any

import pytest

from benchmarks.goals import GOALS

FASTER_ON_ONE_NODE, TWICE_BETWEEN_NODES, FLOOR_BETWEEN_NODES = GOALS[0], GOALS[4], GOALS[5]


def cell(scene: str, tokens: int, **medians: float) -> dict[str, Any]:
    """Return a measured cell with the given medians in microseconds."""
    return {
        "cell": {"scene": scene, "world": 2, "tokens": tokens, "hidden": 7168, "dtype": "bf16"},
        "contestants": {name: {"median_us": median} for name, median in medians.items()},
    }


def between_nodes(tokens: int, ours: float, best: float, bare_writes: float) -> dict[str, Any]:
    """Return a cell of ranks that are nodes, in which the second peer is the best one."""
    peers = {"gloo_allgather": 9 * best, "gloo_alltoall": best, "mpi_alltoallv": 2 * best}
    return cell("own_node", tokens, ours=ours, bare_writes=bare_writes, **peers)


def test_a_goal_counts_its_cells_and_names_the_worst() -> None:
    """Cells of the other scene and cells that it does not apply to do not count."""
    line = TWICE_BETWEEN_NODES.judge(
        [
            between_nodes(16, ours=10, best=30, bare_writes=5),
            between_nodes(128, ours=20, best=30, bare_writes=10),
            between_nodes(1024, ours=20, best=24, bare_writes=15),
            between_nodes(1, ours=10, best=1, bare_writes=5),
            cell("same_node", 16, ours=10, gloo_allgather=1, memcpy=1),
        ]
    )
    assert line.startswith("NOT met (1 of 3 cells reach it; bare_writes alone in 2)")
    assert line.endswith("worst 1.20x (2 ranks, 1024 x 7168 bf16)")


@pytest.mark.parametrize(("ours", "verdict"), [(15.0, "met "), (15.1, "NOT met")])
def test_a_bound_above_holds_up_to_the_limit(ours: float, verdict: str) -> None:
    """The goal that is relative to the floor does not judge the floor."""
    line = FLOOR_BETWEEN_NODES.judge([between_nodes(128, ours=ours, best=30, bare_writes=10)])
    assert line.startswith(verdict)
    assert "alone" not in line


@pytest.mark.parametrize(("ours", "verdict"), [(10.0, "met "), (10.1, "NOT met")])
def test_a_bound_below_holds_from_the_limit_on(ours: float, verdict: str) -> None:
    """Also where the floor does not reach it."""
    line = FASTER_ON_ONE_NODE.judge([cell("same_node", 16, ours=ours, gloo_allgather=100, memcpy=11)])
    assert line.startswith(verdict)
    assert "memcpy alone in 0" in line


def test_what_was_not_measured_is_no_verdict() -> None:
    """A run of some cells says which goals it says nothing about."""
    assert FASTER_ON_ONE_NODE.judge([]).startswith("not measured")
