"""Plans of expert moves, against playing them on a table of what every slot holds."""

import random

import pytest

from vllm_efa_ep.errors import ConfigurationError, ExpertTransferError
from vllm_efa_ep.experts_plan import EMPTY, Move, plan_moves


def _play(old: list[int], moves: list[list[Move]], ranks: int, lost: frozenset[int]) -> list[object]:
    """Move named weights as the plan says: all reads first, as with a staging buffer, then all writes."""
    slots = len(old) // ranks
    weights: list[object] = [
        f"garbage of rank {entry // slots}" if entry // slots in lost else expert
        for entry, expert in enumerate(old)
    ]
    writes = [
        (rank * slots + move.slot, weights[move.source * slots + move.source_slot])
        for rank, of_rank in enumerate(moves)
        for move in of_rank
    ]
    for entry, weight in writes:
        weights[entry] = weight
    return weights


def _random_map(rng: random.Random, experts: int, entries: int) -> list[int]:
    """Every expert at least once, copies and empty slots elsewhere."""
    filled = list(range(experts)) + [rng.randrange(-1, experts) for _ in range(entries - experts)]
    rng.shuffle(filled)
    return filled


@pytest.mark.parametrize("seed", range(60))
def test_random_plans_lead_to_the_new_map(seed: int) -> None:
    """Every slot gets its expert; nothing moves in vain, from a lost rank, or from others if it is here."""
    rng = random.Random(seed)
    ranks, slots = rng.randint(1, 9), rng.randint(1, 6)
    experts = rng.randint(1, ranks * slots)
    old = _random_map(rng, experts, ranks * slots)
    lost = frozenset(rank for rank in range(ranks) if rng.random() < 0.15)
    alive = {expert for entry, expert in enumerate(old) if entry // slots not in lost} - {EMPTY}
    new = [expert if expert in alive else EMPTY for expert in _random_map(rng, experts, ranks * slots)]
    moves = plan_moves(old, new, ranks, lost)
    played = _play(old, moves, ranks, lost)
    for entry, expert in enumerate(new):
        rank = entry // slots
        if rank in lost:
            assert not moves[rank]
        elif expert != EMPTY:
            assert played[entry] == expert, f"seed {seed}: slot {entry}"
    for rank, of_rank in enumerate(moves):
        held = {old[entry] for entry in range(rank * slots, (rank + 1) * slots)}
        for move in of_rank:
            assert old[rank * slots + move.slot] != new[rank * slots + move.slot] == move.expert
            assert (move.source == rank) == (move.expert in held)
            assert move.source not in lost


def test_copies_share_the_load() -> None:
    """Eight ranks want an expert that four ranks have."""
    old = [7] * 4 + [0] * 8
    moves = plan_moves(old, [7] * 12, 12)
    sources = [move.source for of_rank in moves for move in of_rank]
    assert sorted(sources) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_expert_without_a_copy_is_named() -> None:
    """Rank 1 had the only one."""
    with pytest.raises(ExpertTransferError, match="no rank that is left has expert 3") as failed:
        plan_moves([0, 1, 2, 3], [0, 3, 2, 3], 2, lost={1})
    assert failed.value.experts == (3,)


@pytest.mark.parametrize(("old", "new", "ranks"), [([0, 1], [0], 1), ([0, 1, 2], [0, 1, 2], 2), ([], [], 0)])
def test_maps_that_do_not_fit_are_refused(old: list[int], new: list[int], ranks: int) -> None:
    """Of different lengths, or not a multiple of the ranks."""
    with pytest.raises(ConfigurationError, match="cannot be those of"):
        plan_moves(old, new, ranks)
