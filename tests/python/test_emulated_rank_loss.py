"""Throughput after a loss, on emulated EFA: virtual time, in which devices and stand-ins cost nothing.

What it shows is the network's share, with the positions of lost ranks on the NICs that were theirs, as
stand-ins of the same host have them. The numbers:

    python -m pytest -s tests/python/test_emulated_rank_loss.py
"""

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from emulated_world import CheckedWorkload, Scene, world_of
from oracle import Batch

from vllm_efa_ep.stand_in import servers

_BEFORE, _AFTER = 3, 4
_GOAL = 0.9
_WITHIN_ROUNDS = 2


class _LossyWorkload(CheckedWorkload):
    """Full batches of all live ranks; notes when each round ended."""

    def __init__(self, scene: Scene) -> None:
        self.world = world_of(scene)
        super().__init__(scene, self.world)
        self.live = set(range(scene.size))
        self.ended: dict[int, float] = {}
        self._owners = torch.tensor(self.config.placement(scene.size))
        self.sent = functools.cache(self._sent)
        self.batches = functools.cache(self._expected)

    def run(self, rounds: int) -> None:
        """Let all live ranks finish so many more rounds, if they can."""
        self.world.run(self, rounds)

    def mask(self, server_of: tuple[int, ...]) -> None:
        """Go on without the ranks that others serve."""
        self.live = set(server_of)
        self.world.mask(list(server_of))

    def finished(self, rank: int, channel: int, round_number: int) -> None:
        """Check the round's result, and take the time."""
        super().finished(rank, channel, round_number)
        self.ended[round_number] = self.world.now()

    def errors(self) -> dict[int, str]:
        """Return what ended each rank, if anything did."""
        return {rank: error for rank in range(self.scene.size) if (error := self.world.error(rank))}

    def _sent(self, _channel: int, round_number: int) -> list[Batch]:
        scene, random = self.scene, torch.Generator().manual_seed(round_number)
        batches = []
        for rank in range(scene.size):
            tokens = scene.max_tokens if rank in self.live else 0
            scores = torch.rand(tokens, scene.experts, generator=random)
            x = torch.randint(-2, 3, (tokens, scene.hidden), generator=random).to(self.config.dtype)
            batches.append(Batch(x, scores.topk(scene.top_k).indices, torch.ones(tokens, scene.top_k), None))
        return batches

    def _expected(self, channel: int, round_number: int) -> list[Batch]:
        lost = torch.tensor([rank not in self.live for rank in range(self.scene.size)])
        return [
            replace(each, topk_ids=each.topk_ids.masked_fill(lost[self._owners[each.topk_ids]], -1))
            for each in self.sent(channel, round_number)
        ]


@pytest.mark.parametrize(
    ("half", "lost"),
    [
        ("combine_send", (5,)),
        pytest.param("dispatch_recv", (5,), marks=pytest.mark.long),
        pytest.param("combine_recv", (5, 6, 20), marks=pytest.mark.long),
        pytest.param("dispatch_send", tuple(range(8, 16)), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_throughput_per_live_rank_is_back_at_once(half: str, lost: tuple[int, ...]) -> None:
    """32 ranks on p5en: some die in a round, all others get an error, and their next rounds are as fast."""
    scene = Scene(
        nodes=4,
        ranks_per_node=8,
        experts=64,
        top_k=8,
        max_tokens=16,
        hidden=2048,
        rounds=_BEFORE,
        exact=True,
        nics=2,
        profile="p5en",
    )
    workload = _LossyWorkload(scene)
    for rank in lost:
        workload.world.kill_before(half, rank, _BEFORE + 1)
    workload.run(_BEFORE + 2)  # what the dead had sent may let others finish the first of them
    survivors = [rank for rank in range(scene.size) if rank not in lost]
    errors = workload.errors()
    assert sorted(errors) == survivors, errors
    assert any(f"rank {lost[0]}" in error or f" {lost[0]}," in error for error in errors.values())

    workload.mask(servers(scene.size, scene.ranks_per_node, survivors))
    agreed = workload.world.now()
    workload.run(_AFTER)
    assert workload.errors() == {}

    seconds = {
        number: workload.ended[number] - workload.ended[number - 1] for number in range(2, _BEFORE + 1)
    }
    before = scene.max_tokens / min(seconds.values())
    first = _BEFORE + 3
    ends = [agreed, *(workload.ended[number] for number in range(first, first + _AFTER))]
    after = [scene.max_tokens / (end - start) for start, end in pairwise(ends)]
    print(f"\nemulated {scene.profile}, {len(lost)} of {scene.size} ranks lost; tokens/s per live rank")
    print(f"  before          {before:12,.0f}")
    for number, each in enumerate(after, 1):
        print(f"  mask + {number} rounds {each:12,.0f}  {each / before:6.1%}")
    assert all(each >= _GOAL * before for each in after[_WITHIN_ROUNDS - 1 :])
