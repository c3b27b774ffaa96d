"""Layers whose activations are quantised: what travels, and that it is what vLLM's quantisers would make."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import reference_moe
import torch
import vllm.utils.flashinfer
from cutedsl_experts import experts_of_nvfp4_dispatch, nvfp4_kernel, scale_at, seen_by_experts
from reference_moe import Layer, assert_close
from routed_tokens import LOCAL_EXPERTS, receives_nothing, some_tokens
from standard_experts import (
    Fp4Experts,
    Mxfp8Experts,
    SelfQuantizingExperts,
    StandardExperts,
    UnreducedExperts,
    swizzled,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm_on_ranks import EXPERTS, MAX_TOKENS, RANKS, VllmRank

from vllm_efa_ep.all_to_all import AllToAll, Dispatched, Handle
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin import wire_format
from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

FP8 = torch.float8_e4m3fn
FP4_GLOBAL_SCALE = 300.0


def fp8_layer(seed: int) -> Layer:
    """Return experts whose weights are e4m3 with scales of 1."""
    layer = Layer.random(EXPERTS, seed)
    return Layer(layer.gate_up.to(FP8), layer.down.to(FP8))


def wire(vllm_rank: VllmRank) -> tuple[torch.dtype, int, int, str]:
    """Return element type, elements and scales of a dispatched row, and what dispatch quantises to."""
    (config,) = vllm_rank.manager._all_to_alls
    return config.dtype, config.columns, config.received_scales, config.quantisation


def fp8_config(block: int = 128) -> FusedMoEQuantConfig:
    """Return e4m3 in blocks for weights and activations."""
    ones = torch.ones(LOCAL_EXPERTS, 256 // block, 256 // block)
    w2_scale = ones[:, :, : 128 // block].contiguous()
    return FusedMoEQuantConfig.make(FP8, block_shape=[block, block], w1_scale=ones, w2_scale=w2_scale)


@contextmanager
def scales_as_deep_gemm_wants_them(wanted: bool = True) -> Iterator[None]:
    """Let vLLM think that its GEMMs are DeepGEMM's, whose scales are powers of two."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fp8_utils, wire_format):
            patch.setattr(module, "is_deep_gemm_e8m0_used", lambda: wanted)
        yield


def fp8_blocks(vllm_rank: VllmRank) -> None:
    """Quantised by dispatch, in both backends; as it is for experts that quantise."""
    layer = fp8_layer(3)
    for backend, experts, on_the_wire, seen in (
        (HIGH_THROUGHPUT, StandardExperts, (FP8, 256, 2, "fp8"), reference_moe.through_fp8),
        (LOW_LATENCY, NaiveBatchedExperts, (FP8, 256, 2, "fp8"), reference_moe.through_fp8),
        (HIGH_THROUGHPUT, SelfQuantizingExperts, (torch.bfloat16, 256, 0, "none"), torch.Tensor.float),
    ):
        kernel = vllm_rank.build(backend, experts, layer, quant_config=fp8_config())
        assert wire(vllm_rank) == on_the_wire
        for seed in range(2):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
        vllm_rank.manager.close()


def fp8_blocks_for_deep_gemm(vllm_rank: VllmRank) -> None:
    """The same with scales that are powers of two."""
    layer, seen = fp8_layer(18), partial(reference_moe.through_fp8, power_of_2=True)
    for backend, experts in ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts)):
        with scales_as_deep_gemm_wants_them():
            kernel = vllm_rank.build(backend, experts, layer, quant_config=fp8_config())
            assert wire(vllm_rank) == (FP8, 256, 2, "fp8_power_of_2")
            tokens = some_tokens(vllm_rank.rank, 1)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
        vllm_rank.manager.close()


def fp8_blocks_of_other_sizes(vllm_rank: VllmRank) -> None:
    """Quantised by vLLM before dispatch."""
    layer, seen = fp8_layer(19), partial(reference_moe.through_fp8, block=64)
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer, quant_config=fp8_config(64))
    assert wire(vllm_rank) == (FP8, 256, 4, "none")
    tokens = some_tokens(vllm_rank.rank, 1)
    assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
    vllm_rank.manager.close()


def fp8_as_vllm_makes_it(vllm_rank: VllmRank) -> None:
    """Scales and codes of dispatch are those of vLLM's operator, for rows of all kinds."""
    generator = torch.Generator().manual_seed(vllm_rank.rank)
    rows = torch.randn(MAX_TOKENS, 256, generator=generator)
    rows[1] *= torch.randint(-30, 30, (256,), generator=generator).float().exp2()
    rows[2] = torch.randint(-128, 129, (256,), generator=generator) / 128
    rows[2, ::128] = 1  # as the largest, it puts many of the others in the middle of two codes
    rows[3, :128] = 0
    rows[4] *= 1e-9
    rows[5] *= 1e-39
    rows[6] *= 5e37
    rows[7, 100] = 3e5
    rows = rows.bfloat16()
    ids = torch.full((MAX_TOKENS, 3), -1, dtype=torch.int32)
    ids[:, 0] = vllm_rank.rank * LOCAL_EXPERTS  # own experts, so that the rows come back in order
    weights = torch.ones(MAX_TOKENS, 3)
    for powers_of_2 in (False, True):
        with scales_as_deep_gemm_wants_them(powers_of_2):
            kernel = vllm_rank.build(
                HIGH_THROUGHPUT, StandardExperts, fp8_layer(20), quant_config=fp8_config()
            )
            theirs = moe_kernel_quantize_input(rows, None, FP8, False, [128, 128])
        ours = kernel.kernel.prepare_finalize
        got = ours.prepare(rows, weights, ids, EXPERTS, kernel.expert_map, False, fp8_config(), False)
        assert_same_numbers(rows, got[:2], theirs, smallest_scale=2.0**-33 if powers_of_2 else 0)
        ours.finalize(torch.empty_like(rows), rows, weights, ids, False, TopKWeightAndReduceNoOP())
        vllm_rank.manager.close()


def assert_same_numbers(
    rows: torch.Tensor,
    ours: tuple[torch.Tensor, torch.Tensor],
    theirs: tuple[torch.Tensor, torch.Tensor],
    smallest_scale: float,
) -> None:
    """Compare codes and scales bit for bit, but for what docs/vllm.md names.

    vLLM multiplies by the scale's reciprocal, which moves values in the very middle of two codes; and its
    scales that are powers of two end at ``smallest_scale``, so ours may be finer.
    """
    same_scale = (ours[1] == theirs[1]).repeat_interleave(128, dim=1)
    assert ((ours[1] == theirs[1]) | (ours[1] < smallest_scale)).all()
    exact = rows.double() / ours[1].double().repeat_interleave(128, dim=1)
    own, their = ours[0].double(), theirs[0].double()
    middle = (own + their) / 2
    in_the_middle = (exact - middle).abs() <= 2.0**-22 * middle.abs()
    assert ((own == their) | in_the_middle)[same_scale].all()
    assert ((own - exact).abs() <= (exact.abs() / 16).clamp(min=2.0**-10))[~same_scale].all()


def fp8_rows(vllm_rank: VllmRank) -> None:
    """A scale per token: quantised after dispatch."""
    layer, ones = fp8_layer(4), torch.ones(LOCAL_EXPERTS, 1, 1)
    quant_config = FusedMoEQuantConfig.make(FP8, per_act_token_quant=True, w1_scale=ones, w2_scale=ones)
    for backend, experts in ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts)):
        kernel = vllm_rank.build(backend, experts, layer, quant_config=quant_config)
        assert wire(vllm_rank) == (torch.bfloat16, 256, 0, "none")
        tokens = some_tokens(vllm_rank.rank, 1)
        assert_close(kernel(tokens), reference_moe.output(layer, tokens, reference_moe.through_fp8_rows))
        vllm_rank.manager.close()


def fp8_tensor(vllm_rank: VllmRank) -> None:
    """One scale for all rows that a rank receives; what lies in rows without a token has no part in it."""
    layer, ones = fp8_layer(22), torch.ones(LOCAL_EXPERTS, 1, 1)
    quant_config = FusedMoEQuantConfig.make(FP8, w1_scale=ones, w2_scale=ones)
    kernel = vllm_rank.build(LOW_LATENCY, NaiveBatchedExperts, layer, quant_config=quant_config)
    assert wire(vllm_rank) == (torch.bfloat16, 256, 0, "none")
    with infinite_unused_rows():
        for seed in range(2):
            result = kernel(some_tokens(vllm_rank.rank, seed))
            assert_close(result, with_a_scale_per_rank(layer, vllm_rank.rank, seed))
    vllm_rank.manager.close()


@contextmanager
def infinite_unused_rows() -> Iterator[None]:
    """Leave the worst in the rows of batched experts that have no token."""
    original = AllToAll.dispatch_recv

    def dispatch_recv(self: AllToAll, handle: Handle) -> Dispatched:
        dispatched = original(self, handle)
        used = torch.arange(dispatched.x.shape[1]) < dispatched.tokens_per_expert.unsqueeze(1)
        dispatched.x[~used] = float("inf")
        return dispatched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllToAll, "dispatch_recv", dispatch_recv)
        yield


def with_a_scale_per_rank(layer: Layer, rank: int, seed: int) -> torch.Tensor:
    """Return what a rank's ``some_tokens`` become; each owner's rows have their common e4m3 scale."""
    everybody = [some_tokens(source, seed) for source in range(RANKS)]
    result = torch.zeros(everybody[rank].x.shape)
    for owner in range(RANKS):
        here = [torch.div(tokens.ids, LOCAL_EXPERTS, rounding_mode="floor") == owner for tokens in everybody]
        rows = [tokens.x[held.any(1)] for tokens, held in zip(everybody, here, strict=True)]
        own = everybody[rank]
        tokens = reference_moe.Tokens(own.x, own.ids.masked_fill(~here[rank], -1), own.weights)
        seen = partial(reference_moe.through_fp8_of, largest=torch.cat(rows).float().abs().amax())
        result += reference_moe.output(layer, tokens, seen)
    return result


def mxfp8(vllm_rank: VllmRank) -> None:
    """Its scales travel as bytes, too, and take the experts' order on arrival."""
    layer = Layer.random(EXPERTS, 10)
    for is_scale_swizzled in (False, True):
        quant_config = FusedMoEQuantConfig.make(
            "mxfp8", block_shape=[1, 32], is_scale_swizzled=is_scale_swizzled
        )
        kernel = vllm_rank.build(HIGH_THROUGHPUT, Mxfp8Experts, layer, quant_config=quant_config)
        assert wire(vllm_rank) == (FP8, 256, 2, "none")
        tokens = some_tokens(vllm_rank.rank, 1)
        assert_close(kernel(tokens), reference_moe.output(layer, tokens, reference_moe.through_mxfp8))
        receives_nothing(kernel, vllm_rank.rank, layer, reference_moe.through_mxfp8)
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
        assert wire(vllm_rank) == (torch.uint8, 128, 4, "none")
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


def fp4_batched_from_dispatch(vllm_rank: VllmRank) -> None:
    """If vLLM's setting says so, its batched experts take nvfp4 from dispatch: the class is as released."""
    with experts_of_nvfp4_dispatch():
        kernel, layer = nvfp4_kernel(vllm_rank, 21)
        assert wire(vllm_rank) == (torch.uint8, 128, 4, "none")
        for seed in range(2):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen_by_experts))
        receives_nothing(kernel, vllm_rank.rank, layer, seen_by_experts)
        with pytest.raises(ConfigurationError, match="multiple of 64, not 80; unset it"):
            nvfp4_kernel(vllm_rank, 21, hidden=80)
    vllm_rank.manager.close()


def fp4_scales_in_tiles(_: VllmRank) -> None:
    """Where flashinfer's GEMM looks for the scale of a row, for more rows than a tile has."""
    for rows in (256, 300):
        scales = torch.randint(0, 127, (2, rows, 24)).to(torch.uint8).view(torch.float8_e4m3fn)
        format_ = wire_format.WireFormat(torch.uint8, 192, 6, torch.float8_e4m3fn)
        words = scales.view(torch.float32)
        tiles = format_.scales(words, FusedMoEQuantConfig.make("nvfp4", weight_dtype="nvfp4"))
        assert tiles.permute(5, 2, 4, 0, 1, 3).is_contiguous()
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(24), indexing="ij")
        for group in range(2):
            assert torch.equal(scale_at(tiles, row, column, group), scales[group].float())


def weights_on_input(vllm_rank: VllmRank) -> None:
    """The router's weight of a top-1 model goes into the activation, before it is quantised."""
    layer = fp8_layer(9)
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer, top_k=1, quant_config=fp8_config())
        tokens = some_tokens(vllm_rank.rank, 3, top_k=1)
        expected = reference_moe.output(layer, tokens, reference_moe.through_fp8, weights_on_input=True)
        assert_close(kernel(tokens, apply_router_weight_on_input=True), expected)
        vllm_rank.manager.close()


QUANTISED_SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (
    fp8_blocks,
    fp8_blocks_for_deep_gemm,
    fp8_blocks_of_other_sizes,
    fp8_as_vllm_makes_it,
    fp8_rows,
    fp8_tensor,
    mxfp8,
    fp4,
    fp4_batched,
    fp4_batched_from_dispatch,
    fp4_scales_in_tiles,
    weights_on_input,
)
