"""Worlds that made other expert-parallel libraries hang, abort or lose data: see docs/robustness.md."""

import pytest
import torch
from emulated_world import Scene, play
from oracle import Batch, check_combined, check_dispatched, compute_experts
from thread_world import Rendezvous, ThreadBootstrap, run_ranks, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig

_LAYOUTS = ("per_token", "per_expert")


def _batches(config: AllToAllConfig, size: int, seed: int) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(size):
        tokens = int(torch.randint(0, config.max_tokens_per_rank + 1, (), generator=random))
        shape = (tokens, config.top_k)
        batches.append(
            Batch(
                torch.randn(tokens, config.columns, generator=random).to(config.dtype),
                torch.randint(-1, config.num_experts, shape, generator=random),
                torch.randn(shape, generator=random),
                torch.rand(tokens, config.scale_columns, generator=random) if config.scale_columns else None,
            )
        )
    return batches


def _play_round(all_to_all: AllToAll, batches: list[Batch]) -> None:
    config, own = all_to_all.config, batches[all_to_all.rank]
    got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights, own.scales)
    check_dispatched(config, batches, all_to_all.local_experts, got)
    per_expert = config.layout == "per_expert"
    output = compute_experts(
        config, all_to_all.local_experts, got, per_slot=per_expert, weighted=not per_expert
    )
    check_combined(config, own, True, False, all_to_all.combine(output, handle))


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_256_fp8_experts_on_16_ranks_start_and_run(layout: str) -> None:
    """The shape of DeepSeek-V3 with TP1/DP16/EP16, over real libfabric endpoints."""
    config = AllToAllConfig(
        512,
        256,
        8,
        4,
        dtype=torch.float8_e4m3fn,
        scale_columns=4,
        layout=layout,  # type: ignore[arg-type]
    )
    batches = _batches(config, 16, seed=923)
    run_world(config, 16, settings_of(8), lambda all_to_all: _play_round(all_to_all, batches))


def test_several_groups_of_ranks_in_one_process() -> None:
    """As with pipeline stages: each rank is in the whole world and in one of two halves, in turn for long."""
    size = 4
    whole = AllToAllConfig(32, 8, 2, 5)
    halves = [Rendezvous(size // 2) for _ in range(2)]

    def body(bootstrap: ThreadBootstrap) -> None:
        half = ThreadBootstrap(halves[bootstrap.rank // 2], bootstrap.rank % 2)
        with (
            AllToAll(whole, bootstrap, settings_of(1)) as of_all,
            AllToAll(whole, half, settings_of(1)) as of_half,
        ):
            for number in range(100):
                _play_round(of_all, _batches(whole, size, number))
                _play_round(of_half, _batches(whole, size // 2, 1000 * (1 + bootstrap.rank // 2) + number))

    run_ranks(size, body)


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "experts"), [(3, 8, 256), (3, 8, 25), (5, 3, 7), (7, 1, 11)]
)
def test_rank_counts_that_are_no_powers_of_two(
    nodes: int, ranks_per_node: int, experts: int, layout: str
) -> None:
    """And experts that do not divide among them, some ranks having none."""
    play(Scene(nodes, ranks_per_node, experts, top_k=6, layout=layout, rounds=3))


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_top_12(layout: str) -> None:
    """More experts per token than 8 or 9."""
    play(Scene(2, 4, 64, top_k=12, max_tokens=16, layout=layout, rounds=2))


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("ranks_per_node", [1, 4])
def test_one_expert_gets_every_token(ranks_per_node: int, layout: str) -> None:
    """No buffer is private to a pair of ranks, so none overflows."""
    play(
        Scene(
            4, ranks_per_node, 32, top_k=4, max_tokens=64, routing="one_hot_expert", layout=layout, rounds=4
        )
    )


def test_more_rows_per_pair_than_12_bits_count() -> None:
    """5,000 tokens to one rank, in chunks of a few rows."""
    play(Scene(2, 1, 2, top_k=1, max_tokens=5000, chunk_bytes=400, routing="one_hot_expert", rounds=2))


def test_more_ranks_and_experts_than_6_and_10_bits_count() -> None:
    """72 ranks and 1,100 experts."""
    play(Scene(9, 8, 1100, top_k=8, max_tokens=3))


@pytest.mark.parametrize("routing", ["empty", "dropped"])
def test_worlds_without_a_single_row(routing: str) -> None:
    """Ranks without tokens, or whose tokens go nowhere, take part in every round all the same."""
    play(Scene(3, 2, 12, routing=routing, rounds=5, channels=2))
