"""Experts of vLLM's Standard format in plain torch; vLLM has only compiled ones and Triton's."""

# The signatures are vLLM's.
# ruff: noqa: ARG002, ARG004, N803

from typing import Any

import reference_moe
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)


class StandardExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Takes rows with global ids and finds its own experts by ``expert_map``, as vLLM's CUDA experts do."""

    reduces = True
    quantizes_itself = False

    @staticmethod
    def activation_format() -> Any:
        """Rows."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        """As the test wants it."""
        return self.quantizes_itself

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Reduce here, or leave it to combine."""
        return TopKWeightAndReduceNoOP() if self.reduces else TopKWeightAndReduceDelegate()

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """No scratch; one row per token, or one per slot."""
        hidden = self.moe_config.hidden_dim
        return (0,), (0,), (M, hidden) if self.reduces else (M, topk, hidden)

    def dequantized(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return rows as float32."""
        if scales is None:
            return rows.float()
        assert scales.shape[0] == rows.shape[0]
        if scales.dtype == torch.uint8:  # ue8m0
            scales = torch.exp2(scales.float() - 127)
        assert scales.dtype == torch.float32
        return rows.float() * scales.repeat_interleave(rows.shape[1] // scales.shape[1], dim=1)

    def apply(self, output: torch.Tensor, **given: Any) -> None:
        """Compute what ``reference_moe`` computes, for the experts of this rank."""
        rows = self.dequantized(given["hidden_states"], given["a1q_scale"])
        ids, weights = given["topk_ids"], given["topk_weights"]
        local = torch.where(ids < 0, -1, given["expert_map"][ids.clamp(min=0).long()])
        layer = reference_moe.Layer(given["w1"], given["w2"])
        per_slot = torch.zeros(*ids.shape, self.moe_config.hidden_dim)
        for expert in range(given["w1"].shape[0]):
            token, slot = (local == expert).nonzero(as_tuple=True)
            per_slot[token, slot] = layer.expert(expert, rows[token])
        if not self.reduces:
            # Nobody may read the slots of other ranks' experts.
            output.copy_(per_slot.masked_fill((local < 0).unsqueeze(-1), float("nan")))
            return
        output.copy_((per_slot * weights.unsqueeze(-1)).sum(1))


class UnreducedExperts(StandardExperts):
    """Leaves weights and the sum to combine."""

    reduces = False


class SelfQuantizingExperts(StandardExperts):
    """Takes rows as they are, whatever the quantisation."""

    quantizes_itself = True


class Fp4Experts(StandardExperts):
    """Takes packed e2m1 with e4m3 scales of 16 values each, plain or in Blackwell's tiles of 128 x 4."""

    def dequantized(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return rows as float32."""
        assert rows.dtype == torch.uint8
        assert scales is not None
        tokens, columns = rows.shape[0], 2 * rows.shape[1]
        if self.quant_config.is_scale_swizzled:
            scales = unswizzled(scales, tokens, columns // 16)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([values, -values])
        codes = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1).long()
        scale = scales.view(torch.float8_e4m3fn).float() / self.a1_gscale
        return values[codes] * scale.repeat_interleave(16, dim=1)


class Mxfp8Experts(StandardExperts):
    """Takes e4m3 with ue8m0 scales of 32 values each, plain or in Blackwell's tiles of 128 x 4."""

    def dequantized(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return rows as float32."""
        assert rows.dtype == torch.float8_e4m3fn
        assert scales is not None
        if self.quant_config.is_scale_swizzled:
            scales = unswizzled(scales, rows.shape[0], rows.shape[1] // 32)
        return super().dequantized(rows, scales)


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Return uint8 scales ``[m, n]`` in tiles of 128 x 4, padded, as flashinfer's kernel does."""
    rows, columns = scales.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scales
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape)


def unswizzled(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo ``swizzled``."""
    tiles = scales.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns].contiguous()
