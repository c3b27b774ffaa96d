"""What a rank records about time: a sample per round and half, and whom it waited for."""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from thread_world import Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, _core
from vllm_efa_ep.stats import Stats

ROUNDS = 5
LATE_RANK = 1
LATE_S = 0.03


def stats_of_rounds(
    nodes: int, ranks_per_node: int, layout: str, late_s: float, device: str = "cpu", **settings: object
) -> list[Stats]:
    """Run some rounds in which one rank comes late to both operations: when all others have sent."""
    meeting = Meeting(nodes * ranks_per_node)
    config = AllToAllConfig(
        hidden_size=64,
        num_experts=12,
        top_k=3,
        max_tokens_per_rank=9,
        layout=layout,  # type: ignore[arg-type]
        device=device,
    )

    def send(all_to_all: AllToAll, half: Callable[[], Any]) -> Any:
        if all_to_all.rank == LATE_RANK:
            meeting.wait()
            time.sleep(late_s)  # this slowness is what is measured
            return half()
        result = half()
        meeting.wait()
        return result

    def body(all_to_all: AllToAll) -> Stats:
        random = torch.Generator().manual_seed(all_to_all.rank)
        for number in range(ROUNDS):
            tokens = 1 + 2 * number  # more rows every time: the output buffer has to grow
            x = torch.randn(tokens, 64, generator=random).bfloat16()
            ids = torch.randint(12, (tokens, 3), generator=random)
            handle = send(all_to_all, partial(all_to_all.dispatch_send, x, ids, torch.ones(tokens, 3)))
            got = all_to_all.dispatch_recv(handle)
            output = torch.zeros_like(got.x, dtype=torch.bfloat16)
            send(all_to_all, partial(all_to_all.combine_send, output, handle))
            all_to_all.combine_recv(handle)
        return all_to_all.stats()

    return run_world(config, nodes * ranks_per_node, settings_of(ranks_per_node, **settings), body)


def expect_samples(stats: Stats, rounds: int) -> None:
    """Compare histograms with the number of rounds, and the totals with the histograms' buckets."""
    bounds = [0.0, *_core.duration_bounds()]
    for totals, buckets in (
        (stats.half_seconds, stats.half_buckets),
        (stats.wait_seconds, stats.wait_buckets),
    ):
        assert len(buckets) == 4
        for half, counts in buckets.items():
            assert sum(counts) == rounds, half
            assert counts[-1] == 0
            at_least = sum(count * low for count, low in zip(counts, bounds, strict=True))
            at_most = sum(count * high for count, high in zip(counts, bounds[1:], strict=False))
            assert at_least <= totals[half] <= at_most, half


def test_bounds_of_histograms_double() -> None:
    """From a microsecond on."""
    bounds = _core.duration_bounds()
    assert bounds[0] == pytest.approx(1.024e-6)
    assert all(after == 2 * before for before, after in pairwise(bounds))


@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_every_round_is_one_sample_of_every_half(layout: str) -> None:
    """Also where dispatch_recv runs in two pieces; samples add up to the total within their buckets."""
    for stats in stats_of_rounds(2, 2, layout, late_s=0):
        expect_samples(stats, ROUNDS)


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 3), (3, 1), (2, 2)])
def test_the_slowest_peer_is_the_one_that_comes_late(nodes: int, ranks_per_node: int) -> None:
    """Ranks that meet it directly name it; ranks behind its node mate name the mate, whom they wait for."""
    named = {}
    for rank, stats in enumerate(stats_of_rounds(nodes, ranks_per_node, "per_token", LATE_S)):
        assert sum(stats.waited_for_seconds) <= sum(stats.wait_seconds.values())
        if rank != LATE_RANK:
            named[rank] = stats.slowest_peer
            assert max(stats.waited_for_seconds) >= LATE_S
    assert named[0 if ranks_per_node > 1 else 2] == LATE_RANK
    assert named == dict.fromkeys(named, LATE_RANK) or (nodes, ranks_per_node) == (2, 2)
