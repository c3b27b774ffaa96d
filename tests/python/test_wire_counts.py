"""What crosses the network in a round: the number of writes and bytes, and nothing else."""

import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_world import DEADLINE_S, Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Stats


@dataclass(frozen=True)
class Wire:
    """What one rank writes in one round."""

    writes: int = 0
    bytes: int = 0
    rows: int = 0

    def __add__(self, other: "Wire") -> "Wire":
        """Return the sum."""
        return Wire(self.writes + other.writes, self.bytes + other.bytes, self.rows + other.rows)


def _round_up(value: int) -> int:
    return -(-value // 16) * 16


def _row_bytes(config: AllToAllConfig) -> tuple[int, int]:
    """Return the bytes of a dispatch row (token, ids, weights, payload, scales) and of a combine row."""
    head = _round_up(4 + 4 * config.top_k + 4 * config.top_k)
    payload = config.columns * config.dtype.itemsize + 4 * config.scale_columns
    return head + _round_up(payload), config.hidden_size * config.combine_dtype.itemsize


def _pair(rows: int, row_bytes: int, chunk_bytes: int, nics: int) -> Wire:
    """Return what a pair costs: chunks of equal numbers of rows, at least one per NIC if rows suffice."""
    if rows == 0:
        return Wire(writes=1)
    chunks = 1
    while -(-rows // chunks) > 1 and (-(-rows // chunks) * row_bytes > chunk_bytes or chunks < nics):
        chunks += 1
    rows_per_chunk = -(-rows // chunks)
    return Wire(-(-rows // rows_per_chunk), rows * row_bytes, rows)


def _expected(
    config: AllToAllConfig, ids: list[torch.Tensor], nodes: int, chunk_bytes: int, nics: int, rank: int
) -> Wire:
    """Return what ``rank`` writes in a round in which rank ``r`` routes its tokens by ``ids[r]``."""
    ranks_per_node = len(ids) // nodes
    placement = torch.tensor(config.placement(len(ids)))
    node, index = divmod(rank, ranks_per_node)

    def tokens_to(source: int, target_node: int) -> int:
        target = torch.where(ids[source] >= 0, placement[ids[source].clamp(min=0)] // ranks_per_node, -1)
        return int((target == target_node).any(dim=1).sum())

    dispatch_row, combine_row = _row_bytes(config)
    total = Wire()
    for other in range(nodes):
        if other != node:
            total += _pair(tokens_to(rank, other), dispatch_row, chunk_bytes, nics)
            total += _pair(tokens_to(other * ranks_per_node + index, node), combine_row, chunk_bytes, nics)
    return total


def _settled(all_to_all: AllToAll, writes: int) -> Stats:
    """Return the counters once at least ``writes`` writes are complete here."""
    deadline = time.monotonic() + DEADLINE_S
    while all_to_all.stats().completions < writes:
        assert time.monotonic() < deadline, f"{all_to_all.stats()}: {writes} writes were expected"
        threading.Event().wait(0.001)
    return all_to_all.stats()


def _measure(
    config: AllToAllConfig, ids: list[torch.Tensor], nodes: int, rounds: int = 1, **network: int
) -> list[tuple[Wire, int]]:
    """Run rounds and return what every rank wrote in each, and how many writes it received, on average."""
    size = len(ids)
    meeting = Meeting(size)

    def body(all_to_all: AllToAll) -> tuple[Wire, int]:
        own = ids[all_to_all.rank]
        x = torch.zeros((len(own), config.columns), dtype=config.dtype)
        scales = torch.zeros((len(own), config.scale_columns)) if config.scale_columns else None
        before = all_to_all.stats()
        assert (before.writes, before.bytes_written, before.completions) == (0, 0, 0)
        for _ in range(rounds):
            got, handle = all_to_all.dispatch(x, own, torch.ones(own.shape), scales)
            rows = torch.zeros((got.x.shape[0], config.hidden_size), dtype=config.combine_dtype)
            all_to_all.combine(rows, handle)
        meeting.wait()
        after = _settled(all_to_all, all_to_all.stats().writes)
        meeting.wait()
        assert _counts(all_to_all.stats()) == _counts(after), "something moved after the last round"
        wire = Wire(after.writes // rounds, after.bytes_written // rounds, after.network_rows // rounds)
        assert after.completions == after.writes == wire.writes * rounds
        return wire, after.immediates // rounds

    return run_world(config, size, settings_of(size // nodes, **network), body)


def _counts(stats: Stats) -> Stats:
    return replace(stats, half_seconds={}, wait_seconds={}, retries=0)


def _random_ids(config: AllToAllConfig, size: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = []
    for _ in range(size):
        tokens = int(torch.randint(0, config.max_tokens_per_rank + 1, (), generator=random))
        ids.append(torch.randint(-1, config.num_experts, (tokens, config.top_k), generator=random))
    return ids


@settings(max_examples=100)
@given(
    shape=st.sampled_from([(1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1)]),
    top_k=st.integers(1, 9),
    experts=st.integers(1, 30),
    hidden=st.sampled_from([16, 48, 512]),
    scale_columns=st.integers(0, 3),
    max_tokens=st.integers(1, 50),
    chunk_bytes=st.sampled_from([1, 700, 5000, 256 * 1024]),
    nics=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_write_and_byte_is_accounted_for(
    shape: tuple[int, int],
    top_k: int,
    experts: int,
    hidden: int,
    scale_columns: int,
    max_tokens: int,
    chunk_bytes: int,
    nics: int,
    seed: int,
) -> None:
    """One row per (token, node) in each direction, a write per chunk, a signal for a pair without rows."""
    nodes, ranks_per_node = shape
    dtype = torch.float8_e4m3fn
    config = AllToAllConfig(hidden, experts, top_k, max_tokens, dtype=dtype, scale_columns=scale_columns)
    ids = _random_ids(config, nodes * ranks_per_node, seed)
    measured = _measure(config, ids, nodes, chunk_bytes=chunk_bytes, nics_per_rank=nics)
    expected = [_expected(config, ids, nodes, chunk_bytes, nics, rank) for rank in range(len(ids))]
    assert [wire for wire, _ in measured] == expected
    for rank, (_, received) in enumerate(measured):
        # All writes to a rank come along its rail, so those of a rail are received on that rail.
        rail = range(rank % ranks_per_node, len(ids), ranks_per_node)
        assert sum(measured[peer][1] for peer in rail) == sum(expected[peer].writes for peer in rail)
        assert (received == 0) == (nodes == 1)


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 1), (3, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_a_round_takes_two_writes_per_other_node(nodes: int, ranks_per_node: int, tokens: int) -> None:
    """``2 (N-1)`` writes if every pair fits a chunk, with rows or without, in every round."""
    size = nodes * ranks_per_node
    config = AllToAllConfig(64, size, size, 16)
    ids = [torch.arange(size).repeat(tokens, 1)] * size
    for wire, received in _measure(config, ids, nodes, rounds=5):
        assert wire.writes == received == 2 * (nodes - 1)
        assert wire.rows == 2 * (nodes - 1) * tokens
        assert wire.bytes == (nodes - 1) * tokens * sum(_row_bytes(config))


def test_writes_do_not_depend_on_experts_and_top_k() -> None:
    """A token crosses to a node once, however many of the node's experts it goes to."""
    nodes, ranks_per_node, tokens = 2, 2, 12
    random = torch.Generator().manual_seed(7)
    target = torch.randint(0, nodes, (tokens, 1), generator=random)
    seen = set()
    for experts_per_node, top_k in ((2, 1), (8, 4), (64, 32)):
        within = torch.stack(
            [torch.randperm(experts_per_node, generator=random)[:top_k] for _ in range(tokens)]
        )
        ids = [target * experts_per_node + within] * (nodes * ranks_per_node)
        config = AllToAllConfig(64, nodes * experts_per_node, top_k, tokens)
        seen.add(tuple((wire.writes, wire.rows) for wire, _ in _measure(config, ids, nodes)))
    assert len(seen) == 1
