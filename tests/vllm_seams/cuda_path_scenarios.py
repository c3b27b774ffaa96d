"""What the CUDA path must compute, each scenario on all ranks at once, compared with ``reference_moe``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import reference_moe
import torch
import vllm.utils.flashinfer
from cuda_path_order import ORDER_SCENARIOS, assert_sent_in_place, recorded_launches
from cuda_path_refusals import REFUSAL_SCENARIOS
from reference_moe import Layer, Tokens, assert_close
from standard_experts import Fp4Experts, SelfQuantizingExperts, StandardExperts, UnreducedExperts, swizzled
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm_on_ranks import EXPERTS, RANKS, VllmRank

from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

# Ranks take turns, so that each has no tokens once, and once as many as there can be.
TOKEN_COUNTS = (5, 0, 8, 3)
LOCAL_EXPERTS = EXPERTS // RANKS
FP8 = torch.float8_e4m3fn
FP4_GLOBAL_SCALE = 300.0


def some_tokens(rank: int, seed: int, top_k: int = 3) -> Tokens:
    """Return a rank's tokens, for experts anywhere."""
    return Tokens.random(TOKEN_COUNTS[(rank + seed) % RANKS], top_k, range(EXPERTS), RANKS * seed + rank)


def fp8_layer(seed: int) -> Layer:
    """Return experts whose weights are e4m3 with scales of 1."""
    layer = Layer.random(EXPERTS, seed)
    return Layer(layer.gate_up.to(FP8), layer.down.to(FP8))


def wire(vllm_rank: VllmRank) -> tuple[torch.dtype, int, int]:
    """Return element type, elements and words of scales of a dispatched row."""
    (config,) = vllm_rank.manager._all_to_alls
    return config.dtype, config.columns, config.scale_columns


def both_formats(vllm_rank: VllmRank) -> None:
    """bf16, with unequal and no tokens, over NVLink's and the network's stand-in."""
    layer = Layer.random(EXPERTS, 1)
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer)
        for seed in range(RANKS):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens))
        (all_to_all,) = vllm_rank.manager._all_to_alls.values()
        assert (all_to_all.stats().nodes, all_to_all.stats().provider) == (2, "efaemu")
        assert all_to_all.config.device == "cuda"
        vllm_rank.manager.close()


def round_robin(vllm_rank: VllmRank) -> None:
    """Placed one by one where the format allows it; vLLM keeps to blocks where experts count on them."""
    layer = Layer.random(EXPERTS, 2)
    for backend, experts, own in (
        (LOW_LATENCY, NaiveBatchedExperts, range(vllm_rank.rank, EXPERTS, RANKS)),
        (HIGH_THROUGHPUT, StandardExperts, range(LOCAL_EXPERTS * vllm_rank.rank, EXPERTS)[:LOCAL_EXPERTS]),
    ):
        kernel = vllm_rank.build(backend, experts, layer, placement="round_robin")
        assert (kernel.expert_map >= 0).nonzero().flatten().tolist() == list(own)
        tokens = some_tokens(vllm_rank.rank, 0)
        assert_close(kernel(tokens), reference_moe.output(layer, tokens))
        vllm_rank.manager.close()


def fp8_blocks(vllm_rank: VllmRank) -> None:
    """Quantised before dispatch, in both backends; as it is for experts that quantise."""
    layer, ones = fp8_layer(3), torch.ones(LOCAL_EXPERTS, 2, 2)
    quant_config = FusedMoEQuantConfig.make(
        FP8, block_shape=[128, 128], w1_scale=ones, w2_scale=ones[:, :, :1].contiguous()
    )
    for backend, experts, on_the_wire, seen in (
        (HIGH_THROUGHPUT, StandardExperts, (FP8, 256, 2), reference_moe.through_fp8),
        (LOW_LATENCY, NaiveBatchedExperts, (FP8, 256, 2), reference_moe.through_fp8),
        (HIGH_THROUGHPUT, SelfQuantizingExperts, (torch.bfloat16, 256, 0), torch.Tensor.float),
    ):
        kernel = vllm_rank.build(backend, experts, layer, quant_config=quant_config)
        assert wire(vllm_rank) == on_the_wire
        for seed in range(2):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
        vllm_rank.manager.close()


def fp8_rows(vllm_rank: VllmRank) -> None:
    """A scale per token: quantised after dispatch."""
    layer, ones = fp8_layer(4), torch.ones(LOCAL_EXPERTS, 1, 1)
    quant_config = FusedMoEQuantConfig.make(FP8, per_act_token_quant=True, w1_scale=ones, w2_scale=ones)
    for backend, experts in ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts)):
        kernel = vllm_rank.build(backend, experts, layer, quant_config=quant_config)
        assert wire(vllm_rank) == (torch.bfloat16, 256, 0)
        tokens = some_tokens(vllm_rank.rank, 1)
        assert_close(kernel(tokens), reference_moe.output(layer, tokens, reference_moe.through_fp8_rows))
        vllm_rank.manager.close()


def mxfp8(vllm_rank: VllmRank) -> None:
    """Its scales travel as bytes, too."""
    layer = Layer.random(EXPERTS, 10)
    quant_config = FusedMoEQuantConfig.make("mxfp8", block_shape=[1, 32])
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer, quant_config=quant_config)
    assert wire(vllm_rank) == (FP8, 256, 2)
    tokens = some_tokens(vllm_rank.rank, 1)
    assert_close(kernel(tokens), reference_moe.output(layer, tokens, reference_moe.through_mxfp8))
    vllm_rank.manager.close()


def fp4(vllm_rank: VllmRank) -> None:
    """nvfp4 travels as the bytes vLLM makes; only then its scales take the experts' order."""
    layer = Layer.random(EXPERTS, 5)
    vllm.utils.flashinfer.nvfp4_block_scale_interleave = swizzled  # what flashinfer has compiled
    seen = partial(reference_moe.through_fp4, global_scale=FP4_GLOBAL_SCALE)
    for is_scale_swizzled in (False, True):
        quant_config = FusedMoEQuantConfig.make(
            "nvfp4",
            a1_gscale=torch.tensor(FP4_GLOBAL_SCALE),
            weight_dtype="nvfp4",
            is_scale_swizzled=is_scale_swizzled,
        )
        kernel = vllm_rank.build(HIGH_THROUGHPUT, Fp4Experts, layer, quant_config=quant_config)
        assert wire(vllm_rank) == (torch.uint8, 128, 4)
        for seed in range(2):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
        receives_nothing(kernel, vllm_rank.rank, layer, seen)
        vllm_rank.manager.close()


def fp4_batched(vllm_rank: VllmRank) -> None:
    """Batched experts for nvfp4 quantise what they get by themselves: it is bf16."""

    class Unquantized(NaiveBatchedExperts):  # type: ignore[misc]
        def apply(self, **given: Any) -> None:
            assert given["a1q_scale"] is None
            assert given["hidden_states"].dtype == torch.bfloat16
            self.quant_config = FusedMoEQuantConfig.make()
            super().apply(**given)

    layer = Layer.random(EXPERTS, 6)
    quant_config = FusedMoEQuantConfig.make(
        "nvfp4", a1_gscale=torch.ones(LOCAL_EXPERTS), weight_dtype="nvfp4"
    )
    kernel = vllm_rank.build(LOW_LATENCY, Unquantized, layer, quant_config=quant_config)
    tokens = some_tokens(vllm_rank.rank, 2)
    assert_close(kernel(tokens), reference_moe.output(layer, tokens))
    vllm_rank.manager.close()


def receives_nothing(
    kernel: Any, rank: int, layer: Layer, seen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
) -> None:
    """Let all tokens go to the first rank: vLLM skips the experts of the others."""
    tokens = Tokens.random(4, 3, range(LOCAL_EXPERTS), rank)
    assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))


def all_to_one_rank(vllm_rank: VllmRank) -> None:
    """Ranks without any row, in every way to leave work to combine."""
    layer = Layer.random(EXPERTS, 7)
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer)
        receives_nothing(kernel, vllm_rank.rank, layer)
        vllm_rank.manager.close()


def results_in_place(vllm_rank: VllmRank) -> None:
    """Experts write where other ranks read, for any number of rows, even that of the layer's output."""
    layer = Layer.random(EXPERTS, 8)
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer)
    # Everybody's tokens go to the next rank's experts: what is written is somebody else's.
    first = LOCAL_EXPERTS * ((vllm_rank.rank + 1) % RANKS)
    for count in (6, 6, 1 + vllm_rank.rank):
        tokens = Tokens.random(count, 3, range(first, first + LOCAL_EXPERTS), vllm_rank.rank)
        tokens.ids[:, :LOCAL_EXPERTS] = torch.arange(first, first + LOCAL_EXPERTS)
        with recorded_launches() as launches:
            result = kernel(tokens)
        assert_sent_in_place(vllm_rank, launches)
        assert_close(result, reference_moe.output(layer, tokens))
    vllm_rank.manager.close()


def weights_on_input(vllm_rank: VllmRank) -> None:
    """The router's weight of a top-1 model goes into the activation, before it is quantised."""
    layer, ones = fp8_layer(9), torch.ones(LOCAL_EXPERTS, 2, 2)
    blocks = FusedMoEQuantConfig.make(
        FP8, block_shape=[128, 128], w1_scale=ones, w2_scale=ones[:, :, :1].contiguous()
    )
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer, top_k=1, quant_config=blocks)
        tokens = some_tokens(vllm_rank.rank, 3, top_k=1)
        expected = reference_moe.output(layer, tokens, reference_moe.through_fp8, weights_on_input=True)
        assert_close(kernel(tokens, apply_router_weight_on_input=True), expected)
        vllm_rank.manager.close()


SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (
    both_formats,
    round_robin,
    fp8_blocks,
    fp8_rows,
    mxfp8,
    fp4,
    fp4_batched,
    all_to_one_rank,
    results_in_place,
    weights_on_input,
    *ORDER_SCENARIOS,
    *REFUSAL_SCENARIOS,
)
