"""The memory plan says to the byte what is allocated."""

from pathlib import Path

import pytest
import torch
from formulas import arena_sections
from hypothesis import given
from hypothesis import strategies as st
from thread_world import Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError

_HUGE_PAGE = 2 * 2**20


def _mapped_arenas() -> dict[int, list[int]]:
    """Return the sizes of this process's mappings of arenas, by the inode of their memory."""
    sizes: dict[int, list[int]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "efa_ep_arena" in line:
            addresses, _, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            sizes.setdefault(int(inode), []).append(end - start)
    return sizes


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (2, 2), (3, 1)])
def test_the_plan_is_what_is_mapped(nodes: int, ranks_per_node: int, channels: int) -> None:
    """Every rank has one arena of the planned size, mapped once by every rank of its node."""
    size = nodes * ranks_per_node
    config = AllToAllConfig(1024, 16, 4, 200, channels=channels)
    meeting = Meeting(size)

    def body(all_to_all: AllToAll) -> int:
        meeting.wait()
        mapped = _mapped_arenas()
        meeting.wait()
        total = all_to_all.memory_plan().total
        assert len(mapped) == size
        assert set(map(tuple, mapped.values())) == {(total,) * ranks_per_node}
        return total

    totals = run_world(config, size, settings_of(ranks_per_node), body)
    assert set(totals) == {config.memory_plan(size, ranks_per_node).total}
    assert _mapped_arenas() == {}


@given(
    nodes=st.integers(1, 128),
    ranks_per_node=st.integers(1, 8),
    hidden=st.integers(1, 1024).map(lambda blocks: 16 * blocks),
    top_k=st.integers(1, 32),
    max_tokens=st.integers(1, 65535),
    scale_columns=st.integers(0, 100),
    channels=st.integers(1, 2),
)
def test_the_sections_follow_the_formulas(
    nodes: int,
    ranks_per_node: int,
    hidden: int,
    top_k: int,
    max_tokens: int,
    scale_columns: int,
    channels: int,
) -> None:
    """Slots hold a row per token and other node, dispatch staging one per node, results one per rank."""
    config = AllToAllConfig(
        hidden,
        1,
        top_k,
        max_tokens,
        dtype=torch.float8_e4m3fn,
        scale_columns=scale_columns,
        channels=channels,
    )
    plan = config.memory_plan(nodes * ranks_per_node, ranks_per_node)
    size = nodes * ranks_per_node
    pages = arena_sections(config, size, ranks_per_node)
    assert plan.sections == pages
    assert plan.channels == channels
    used = channels * sum(pages.values())
    assert plan.total == -(-used // _HUGE_PAGE) * _HUGE_PAGE
    assert plan.rounding == plan.total - used


def test_a_large_model_on_64_ranks_takes_little() -> None:
    """DeepSeek-V3's shape: 8 nodes of 8 ranks, 128 tokens of 7168 in fp8, top-8: at most 0.4 GiB."""
    config = AllToAllConfig(7168, 256, 8, 128, dtype=torch.float8_e4m3fn, scale_columns=56)
    assert config.memory_plan(64, 8).total <= 0.4 * 2**30


def test_the_plan_prints_its_sum() -> None:
    """People read the same numbers."""
    plan = AllToAllConfig(1024, 8, 2, 64).memory_plan(4, 2)
    text = str(plan)
    assert f"{plan.total:,}" in text
    assert all(name in text for name in plan.sections)


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "expected"),
    [
        (6, 4, "6 ranks do not divide into nodes of 4"),
        (4, 0, "ranks per node is 0; use 1 to 4"),
        (4, 8, "ranks per node is 8; use 1 to 4"),
        (2048, 8, "world size is 2048; use 1 to 1024"),
        (1024, 4, "number of nodes is 256; use 1 to 128"),
    ],
)
def test_impossible_worlds_have_no_plan(world_size: int, ranks_per_node: int, expected: str) -> None:
    """The bounds of the protocol hold for plans as well."""
    with pytest.raises(ConfigurationError, match=expected):
        AllToAllConfig(1024, 8, 2, 64).memory_plan(world_size, ranks_per_node)
