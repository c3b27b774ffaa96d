"""Throughput after a loss, on emulated EFA: virtual time, in which devices and stand-ins cost nothing.

What it shows is the network's share. Positions of lost ranks are on the NICs that were theirs, as stand-ins
of one host have them; those of a lost node share the NICs of the ranks that serve them. The numbers:

    python -m pytest -s tests/python/test_emulated_rank_loss.py
"""

import functools
from dataclasses import replace

import pytest
import torch
from emulated_world import CheckedWorkload, Scene, world_of
from oracle import Batch

from vllm_efa_ep.stand_in import servers

_BEFORE, _AFTER = 6, 8
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
        self._given = self.sent
        self.batches = functools.cache(self._expected)

    def run(self, rounds: int) -> None:
        """Let all live ranks finish so many more rounds, if they can."""
        self.world.run(self, rounds)

    def mask(self, server_of: tuple[int, ...]) -> None:
        """Go on without the ranks that others serve."""
        self.live = set(server_of)
        self.world.mask(list(server_of))

    def spare(self, lost: tuple[int, ...]) -> None:
        """Lose nobody, but give these ranks no tokens, and their experts none: the load after their loss."""
        self.live -= {*lost}
        self.sent = self.batches

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
            for each in self._given(channel, round_number)
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
    """32 ranks on p5en: some die in a round, all others get an error, and their next rounds are as fast.

    As fast as in a world with the same load that has lost nobody: ranks without tokens slow the others down a
    little, whether they are gone or not.
    """
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
    spared = _LossyWorkload(scene)
    spared.spare(lost)
    spared.run(_AFTER)
    assert spared.errors() == {}

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

    before = _rate(workload, 1, _BEFORE)
    last = _BEFORE + 2 + _AFTER
    first_s, second_s = (workload.ended[last - _AFTER + number] - agreed for number in (1, 2))
    after = _rate(workload, last - _AFTER + _WITHIN_ROUNDS - 1, last)
    same_load = _rate(spared, _WITHIN_ROUNDS - 1, _AFTER)
    print(f"\nemulated {scene.profile}, {len(lost)} of {scene.size} ranks lost; tokens/s per live rank")
    print(f"  before the loss                 {before:12,.0f}")
    for name, seconds in (("1st round after the mask", first_s), ("2nd", second_s - first_s)):
        print(f"  {name:<31} {scene.max_tokens / seconds:12,.0f}  {scene.max_tokens / seconds / before:6.1%}")
    print(f"  from the 2nd on                 {after:12,.0f}  {after / before:6.1%}")
    print(f"  the same load without a loss    {same_load:12,.0f}  {same_load / before:6.1%}")
    assert after >= _GOAL * same_load


def _rate(workload: _LossyWorkload, start: int, end: int) -> float:
    """Return the tokens per second and live rank from the end of one round to the end of another."""
    return (end - start) * workload.scene.max_tokens / (workload.ended[end] - workload.ended[start])
