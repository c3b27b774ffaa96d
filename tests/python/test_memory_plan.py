"""The memory plan says to the byte what is allocated."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from formulas import arena_sections
from hypothesis import given
from hypothesis import strategies as st
from thread_world import Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.cli import main
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
        arena = all_to_all.memory_plan().arena
        assert len(mapped) == size
        assert set(map(tuple, mapped.values())) == {(arena,) * ranks_per_node}
        return arena

    arenas = run_world(config, size, settings_of(ranks_per_node), body)
    assert set(arenas) == {config.memory_plan(size, ranks_per_node).arena}
    assert _mapped_arenas() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_columns": 3, "dtype": torch.uint8, "channels": 2},
        {"quantisation": "fp8", "dtype": torch.float8_e4m3fn},
        {"quantisation": "fp8_ue8m0", "dtype": torch.float8_e4m3fn},
        {"expert_to_rank": (0, 0, 1, 0, 0)},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_the_plan_is_what_received_rows_lie_in(
    layout: Literal["per_token", "per_expert"], changes: Any
) -> None:
    """Every rank receives as much as it ever can; what its tensors lie in is what was planned."""
    config = replace(AllToAllConfig(256, 5, 2, 20, layout=layout), **changes)
    owners = config.placement(2)
    experts = [owners.index(rank) for rank in range(2)]  # one of each rank, for every token

    def body(all_to_all: AllToAll) -> int:
        tokens = torch.ones(20, 256).to(config.input_dtype)
        scales = torch.ones(20, config.scale_columns) if config.scale_columns else None
        allocated = 0
        for channel in range(config.channels):
            routing = torch.tensor([experts] * 20), torch.ones(20, 2)
            got, handle = all_to_all.dispatch(tokens, *routing, scales, channel)
            tensors = [tensor for tensor in got if tensor is not None]
            allocated += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            rows = got.x if layout == "per_token" else got.x.new_empty(*got.x.shape[:2], 256)
            all_to_all.combine(torch.zeros_like(rows, dtype=torch.bfloat16), handle)
        plan = all_to_all.memory_plan()
        assert allocated == plan.received_rows
        assert plan == config.memory_plan(2, 1, all_to_all.rank)
        return allocated

    assert max(run_world(config, 2, settings_of(1), body)) == config.memory_plan(2, 1).received_rows


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
    assert plan.arena == -(-used // _HUGE_PAGE) * _HUGE_PAGE
    assert plan.rounding == plan.arena - used
    assert plan.total == plan.arena + plan.received_rows


@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_a_large_model_on_64_ranks_takes_little(layout: Literal["per_token", "per_expert"]) -> None:
    """DeepSeek-V3's shape: 8 nodes of 8 ranks, 128 tokens of 7168 in fp8, top-8: at most 0.4 GiB."""
    config = AllToAllConfig(7168, 256, 8, 128, torch.float8_e4m3fn, scale_columns=56, layout=layout)
    assert config.memory_plan(64, 8).total <= 0.4 * 2**30


def test_the_command_knows_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """Received rows of a batched layout take several times as much."""
    for layout in ("per_token", "per_expert"):
        config = AllToAllConfig(1024, 8, 2, 64, layout=layout)  # type: ignore[arg-type]
        shape = "--ranks 4 --ranks-per-node 2 --tokens 64 --hidden 1024 --experts 8 --top-k 2"
        assert main(["plan", *shape.split(), "--layout", layout]) == 0
        assert capsys.readouterr().out == f"{config.memory_plan(4, 2)}\n"


def test_the_plan_prints_its_sum() -> None:
    """People read the same numbers."""
    plan = AllToAllConfig(1024, 8, 2, 64).memory_plan(4, 2)
    text = str(plan)
    assert all(f"{size:,}" in text for size in (plan.arena, plan.received_rows, plan.total))
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
