"""Batched experts of vLLM for nvfp4, with what flashinfer has compiled for them, in torch, as documented."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import reference_moe
import torch
import torch.nn.functional as functional
from standard_experts import swizzled
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts import flashinfer_cutedsl_batched_moe as cutedsl
from vllm_on_ranks import EXPERTS, RANKS, Kernel, VllmRank

from vllm_efa_ep.vllm_plugin.backend_names import LOW_LATENCY

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """Return the numbers of packed codes ``[..., n]``, the lower four bits first: ``[..., 2 n]``."""
    return E2M1[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]


def scale_at(scales: torch.Tensor, row: torch.Tensor, column: torch.Tensor, group: int) -> torch.Tensor:
    """Return scales out of ``[32, 4, m / 128, 4, k / 4, groups]``, by the docstring of flashinfer's GEMM."""
    return scales.float()[row % 32, row % 128 // 32, row // 128, column % 4, column // 4, group]


def matrix_of(codes: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Return one group's matrix as numbers."""
    values = values_of(codes[:, :, group])
    row, column = torch.arange(values.shape[0]), torch.arange(values.shape[1] // 16)
    return values * scale_at(scales, row.unsqueeze(1), column, group).repeat_interleave(16, dim=1)


def grouped_gemm(
    a: tuple[torch.Tensor, torch.Tensor | None],
    b: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    masked_m: torch.Tensor,
    *,
    alpha: torch.Tensor,
    **_: Any,
) -> None:
    """Stand for ``grouped_gemm_nt_masked``: out [m, n, groups] = alpha * a [m, k, groups] @ b [n, k, groups].

    Without scales, ``a`` is plain numbers. Rows beyond ``masked_m`` of a group are nobody's.
    """
    codes, scales = a
    columns, _, groups = b[0].shape
    weight_scales = b[1].view(groups, columns // 128, -1, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)
    for group in range(groups):
        left = codes[:, :, group].float() if scales is None else matrix_of(codes, scales, group)
        product = alpha[0, 0, group] * functional.linear(left, matrix_of(b[0], weight_scales, group))
        unused = torch.arange(len(left)).unsqueeze(1) >= masked_m[group]
        out[:, :, group] = product.masked_fill(unused, float("nan"))


def activate(rows: torch.Tensor, *_: object) -> tuple[torch.Tensor, None]:
    """Stand for ``silu_and_mul_scaled_nvfp4_experts_quantize``, but leave the numbers as they are."""
    gate, up = rows.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).permute(1, 2, 0), None


@contextmanager
def experts_of_nvfp4_dispatch() -> Iterator[None]:
    """Let vLLM's experts expect nvfp4 from dispatch, and find these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutedsl, "flashinfer_cutedsl_grouped_gemm_nt_masked", grouped_gemm)
        patch.setattr(cutedsl, "silu_and_mul_scaled_nvfp4_experts_quantize", activate)
        patch.setenv("VLLM_DEEPEPLL_NVFP4_DISPATCH", "1")
        yield


@dataclass(frozen=True)
class Fp4Weights:
    """One layer's weights in nvfp4.

    Attributes:
        layer: Packed codes, for the kernel.
        numbers: What they stand for, for the reference.
        scales: Of gate_up and of down, ``[experts, n, k / 16]`` in tiles.

    """

    layer: reference_moe.Layer
    numbers: reference_moe.Layer
    scales: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, experts: int, seed: int) -> "Fp4Weights":
        """Return weights that keep the size of activations."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for rows, columns in (
            (2 * reference_moe.INTERMEDIATE, reference_moe.HIDDEN),
            (reference_moe.HIDDEN, reference_moe.INTERMEDIATE),
        ):
            codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator).to(torch.uint8)
            size = torch.randint(1, 9, (experts, rows, columns // 16), generator=generator)
            scales = (size / (16 * columns**0.5)).to(torch.float8_e4m3fn)
            numbers = values_of(codes) * scales.float().repeat_interleave(16, dim=2)
            tiles = torch.stack([swizzled(each.view(torch.uint8)) for each in scales])
            made.append((codes, numbers, tiles.view(torch.float8_e4m3fn)))
        codes, numbers, scales = zip(*made, strict=True)
        return cls(reference_moe.Layer(*codes), reference_moe.Layer(*numbers), scales)


GLOBAL_SCALE = 300.0
"""Of the activations."""


def nvfp4_kernel(vllm_rank: VllmRank, seed: int, hidden: int = reference_moe.HIDDEN) -> tuple[Kernel, Any]:
    """Return a layer's kernel, and its weights as numbers."""
    weights = Fp4Weights.random(EXPERTS, seed)
    local = EXPERTS // RANKS
    own = slice(local * vllm_rank.rank, local * (vllm_rank.rank + 1))
    ones = torch.ones(local)
    quant_config = FusedMoEQuantConfig.make(
        "nvfp4",
        a1_gscale=ones * GLOBAL_SCALE,
        a2_gscale=ones,
        g1_alphas=ones / GLOBAL_SCALE,
        g2_alphas=ones,
        w1_scale=weights.scales[0][own],
        w2_scale=weights.scales[1][own],
        weight_dtype="nvfp4",
    )
    experts = cutedsl.FlashInferCuteDSLBatchedExperts
    kernel = vllm_rank.build(LOW_LATENCY, experts, weights.layer, quant_config=quant_config, hidden=hidden)
    return kernel, weights.numbers


def seen_by_experts(rows: torch.Tensor) -> torch.Tensor:
    """Return what becomes of activations on their way."""
    return reference_moe.through_fp4(rows, GLOBAL_SCALE)
