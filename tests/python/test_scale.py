"""What a rank costs in worlds of 8 to 1024 ranks: exactly what the formulas say, and no time is measured."""

import functools

import pytest
import torch
from formulas import arena_sections, wire_of

from benchmarks.scale import RANKS_PER_NODE, Case, Measured, measure, table

_RANKS = (8, 16, 32, 64, 128)
_ALL_RANKS = (*_RANKS, pytest.param(1024, marks=pytest.mark.long))


@functools.cache
def _case(ranks: int) -> Case:
    # Chunks shorter than most pairs, so that formulas with and without a cut are needed.
    return Case(ranks, tokens=6, hidden=64, rounds=2, chunk_bytes=300)


@functools.cache
def _measured(ranks: int) -> Measured:
    return measure(_case(ranks))


@pytest.mark.parametrize("ranks", _ALL_RANKS)
def test_writes_bytes_and_rows_follow_the_formulas(ranks: int) -> None:
    """For every rank: what it puts on the network, offers to its node and receives."""
    case, measured = _case(ranks), _measured(ranks)
    ids, config = case.ids(), case.config
    placement = torch.tensor(config.placement(ranks))
    # [source, token, owner]: whether a token goes to a rank.
    goes = torch.zeros(ranks, case.tokens, ranks, dtype=torch.bool)
    goes.scatter_(2, placement[torch.stack(ids).long()], True)
    for rank, counters in enumerate(measured.counters):
        wire = wire_of(config, ids, ranks // RANKS_PER_NODE, case.chunk_bytes, case.nics, rank)
        assert counters["writes"] == counters["completions"] == case.rounds * wire.writes
        assert counters["bytes"] == case.rounds * wire.bytes
        assert counters["network_rows"] == case.rounds * wire.rows
        assert counters["received_rows"] == case.rounds * int(goes[:, :, rank].sum())
    total = {name: sum(each[name] for each in measured.counters) for name in measured.counters[0]}
    assert total["immediates"] == total["writes"]


@pytest.mark.parametrize("ranks", _ALL_RANKS)
def test_memory_follows_the_formulas(ranks: int) -> None:
    """To the byte."""
    sections = arena_sections(_case(ranks).config, ranks, RANKS_PER_NODE)
    assert _measured(ranks).arena_bytes == sum(sections.values())


def test_rows_and_events_have_limits() -> None:
    """A rank handles as many rows as its tokens have copies, and a write has a constant number of events."""
    for ranks in _RANKS[1:]:
        case, measured = _case(ranks), _measured(ranks)
        most_copies = min(case.top_k, ranks) * case.tokens
        # Sent and sent back, listed and answered, received: five times at most.
        assert measured.rows <= 5 * most_copies
        writes = sum(each["writes"] for each in measured.counters)
        assert writes <= measured.events <= 4 * writes


def test_the_table_has_a_line_per_world() -> None:
    """With the counts of that world."""
    lines = table([_measured(ranks) for ranks in (8, 16)]).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["8", "1", "0.0"]
    assert float(lines[2].split()[2]) == pytest.approx(_measured(16).mean("writes"), abs=0.05)
