"""How an activation travels to its experts: as the layer made it, or quantised with the scales of its blocks.

Quantised before dispatch, a row has half the bytes (fp8) or little more than a quarter (fp4). vLLM's kernels
quantise; here is only known what they make, and how it fits a payload and float32 scales: scales of one byte
travel four to a float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

_SCALES_PER_FLOAT = 4
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class _ByteScaled:
    """A format of vLLM's whose scales have one byte; its name is a string."""

    dtype: torch.dtype
    values_per_element: int
    values_per_scale: int
    scale_dtype: torch.dtype


_BYTE_SCALED: Mapping[Any, _ByteScaled] = {
    "nvfp4": _ByteScaled(torch.uint8, 2, 16, torch.float8_e4m3fn),
    "mxfp8": _ByteScaled(torch.float8_e4m3fn, 1, 32, torch.uint8),
}


@dataclass(frozen=True)
class WireFormat:
    """What one row consists of.

    Attributes:
        dtype: Element type of the payload.
        columns: Its elements.
        scale_columns: float32 words of scales; 0 for rows that are not quantised.
        scale_dtype: What vLLM's scales are, of which a word holds as many as fit.

    """

    dtype: torch.dtype
    columns: int
    scale_columns: int = 0
    scale_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, moe: Any, quant_config: Any, defer_input_quant: bool, batched: bool) -> "WireFormat":
        """Choose: block-quantised rows where the experts take them, rows as they are otherwise.

        Args:
            moe: vLLM's ``FusedMoEConfig``.
            quant_config: vLLM's ``FusedMoEQuantConfig``, or None.
            defer_input_quant: Whether the experts quantise their input themselves.
            batched: Whether they take the batched format, where vLLM's quantise fp4 themselves in any case.

        """
        hidden = moe.hidden_dim
        as_it_is = cls(moe.in_dtype, hidden)
        if quant_config is None or defer_input_quant:
            return as_it_is
        byte_scaled = _BYTE_SCALED.get(quant_config.quant_dtype)
        if byte_scaled is not None:
            whole_words = _SCALES_PER_FLOAT * byte_scaled.values_per_scale
            padded = hidden % max(whole_words, quant_config.mx_alignment) != 0
            if batched or padded:
                return as_it_is
            columns = hidden // byte_scaled.values_per_element
            return cls(byte_scaled.dtype, columns, hidden // whole_words, byte_scaled.scale_dtype)
        if not quant_config.is_block_quantized or quant_config.quant_dtype not in _FP8:
            return as_it_is
        return cls(quant_config.quant_dtype, hidden, -(-hidden // quant_config.block_shape[1]))

    @property
    def is_quantized(self) -> bool:
        """Whether rows are quantised before dispatch."""
        return self.scale_columns > 0

    def pack(self, rows: torch.Tensor, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return payload and float32 scales of rows ``[T, H]``."""
        if not self.is_quantized:
            return rows, None
        if rows.shape[0] == 0:  # some of vLLM's quantisers cannot
            return (
                rows.new_empty((0, self.columns), dtype=self.dtype),
                rows.new_empty((0, self.scale_columns), dtype=torch.float32),
            )
        # Swizzling would mix the scales of different rows.
        payload, scales = quantize(rows, quant_config, swizzled=False)
        if scales is None:
            raise RuntimeError(f"vLLM quantised to {quant_config.quant_dtype} without scales")
        return payload, scales.contiguous().view(torch.float32)

    def scales(self, words: torch.Tensor | None, quant_config: Any) -> torch.Tensor | None:
        """Return received scales as the experts want them."""
        if words is None:
            return None
        scales = words.view(self.scale_dtype)
        if quant_config.quant_dtype == "nvfp4" and quant_config.is_scale_swizzled and scales.numel():
            from vllm.utils.flashinfer import nvfp4_block_scale_interleave

            return nvfp4_block_scale_interleave(scales.view(torch.uint8))  # type: ignore[no-any-return]
        return scales


def quantize(
    rows: torch.Tensor, quant_config: Any, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantise ``[rows, H]`` as vLLM's configuration says."""
    is_fp4 = quant_config.quant_dtype == "nvfp4"
    quantized, scales = moe_kernel_quantize_input(
        rows,
        quant_config.a1_gscale if is_fp4 else quant_config.a1_scale,
        quant_dtype=quant_config.quant_dtype,
        per_act_token_quant=quant_config.per_act_token_quant,
        block_shape=quant_config.block_shape,
        is_scale_swizzled=swizzled,
        mx_alignment=quant_config.mx_alignment,
    )
    return quantized, scales
