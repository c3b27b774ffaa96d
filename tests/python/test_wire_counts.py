"""What crosses the network in a round: the number of writes and bytes, and nothing else."""

from dataclasses import replace

import pytest
import torch
from formulas import Wire, row_bytes, wire_of
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_world import Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Stats


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
        all_to_all.drain()
        after = all_to_all.stats()
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
    expected = [wire_of(config, ids, nodes, chunk_bytes, nics, rank) for rank in range(len(ids))]
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
        assert wire.bytes == (nodes - 1) * tokens * sum(row_bytes(config))


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
