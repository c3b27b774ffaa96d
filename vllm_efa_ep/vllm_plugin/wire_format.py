"""How an activation travels to its experts: as the layer made it, or quantised with the scales of its blocks.

A quantised row has half the bytes (fp8) or little more than a quarter (fp4). On CUDA, dispatch makes fp8 with
a scale per 128 values of bf16 by itself, as it reads the rows. All else vLLM's kernels quantise before: here
is known what they make, and how it fits a payload and float32 scales: scales of one byte travel four to a
float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import MXFP8_BLOCK_SIZE, swizzle_mxfp8_scale
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

from vllm_efa_ep.all_to_all_config import SCALE_GROUP, Quantisation

_SCALES_PER_FLOAT = 4
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class _ByteScaled:
    """A format of vLLM's whose scales have one byte; its name is a string."""

    dtype: torch.dtype
    values_per_element: int
    values_per_scale: int
    scale_dtype: torch.dtype


NVFP4_VALUES_PER_WORD = 16 * _SCALES_PER_FLOAT
"""Values of nvfp4 whose scales fill a word."""

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
        scale_columns: float32 words of scales that go with it; 0 for none.
        scale_dtype: What vLLM's scales are, of which a word holds as many as fit.
        quantisation: What dispatch makes of the rows, with scales of its own.

    """

    dtype: torch.dtype
    columns: int
    scale_columns: int = 0
    scale_dtype: torch.dtype = torch.float32
    quantisation: Quantisation = "none"

    @classmethod
    def of(
        cls, moe: Any, quant_config: Any, defer_input_quant: bool, takes_byte_scales: bool
    ) -> "WireFormat":
        """Choose: block-quantised rows where the experts take them, rows as they are otherwise.

        Args:
            moe: vLLM's ``FusedMoEConfig``.
            quant_config: vLLM's ``FusedMoEQuantConfig``, or None.
            defer_input_quant: Whether the experts quantise their input themselves.
            takes_byte_scales: Whether they take rows in one of the formats whose scales have one byte.

        """
        hidden = moe.hidden_dim
        as_it_is = cls(moe.in_dtype, hidden)
        if quant_config is None or defer_input_quant:
            return as_it_is
        byte_scaled = _BYTE_SCALED.get(quant_config.quant_dtype)
        if byte_scaled is not None:
            whole_words = _SCALES_PER_FLOAT * byte_scaled.values_per_scale
            padded = hidden % max(whole_words, quant_config.mx_alignment) != 0
            if padded or not takes_byte_scales:
                return as_it_is
            columns = hidden // byte_scaled.values_per_element
            return cls(byte_scaled.dtype, columns, hidden // whole_words, byte_scaled.scale_dtype)
        if not quant_config.is_block_quantized or quant_config.quant_dtype not in _FP8:
            return as_it_is
        if _dispatch_can_quantise(moe, quant_config):
            return cls(quant_config.quant_dtype, hidden, quantisation=_as_vllm_rounds_scales())
        return cls(quant_config.quant_dtype, hidden, -(-hidden // quant_config.block_shape[1]))

    @property
    def is_quantized(self) -> bool:
        """Whether rows travel quantised."""
        return self.scale_columns > 0 or self.quantisation != "none"

    def pack(self, rows: torch.Tensor, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows ``[T, H]`` as dispatch wants them, and their float32 scales if it is to send any."""
        if not self.scale_columns:
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
        if quant_config.quant_dtype == "nvfp4" and words.ndim == 3:
            return _in_tiles(words)
        scales = words.view(self.scale_dtype)
        if self.scale_dtype.itemsize > 1 or not quant_config.is_scale_swizzled or not scales.numel():
            return scales
        if quant_config.quant_dtype == "mxfp8":
            rows, columns = scales.shape
            return swizzle_mxfp8_scale(scales, rows, columns * MXFP8_BLOCK_SIZE)  # type: ignore[no-any-return]
        from vllm.utils.flashinfer import nvfp4_block_scale_interleave

        return nvfp4_block_scale_interleave(scales.view(torch.uint8))  # type: ignore[no-any-return]


def _in_tiles(words: torch.Tensor) -> torch.Tensor:
    """Return scales ``[experts, rows, words]`` in the order of flashinfer's masked GEMM of groups.

    For each expert, tiles of 128 rows x 4 scales, one word; in a tile, row ``32 * b + a`` has place
    ``[a, b]``. The tensor is the view of them that ``scaled_fp4_grouped_quantize`` returns:
    ``[32, 4, tiles of rows, 4, tiles of scales, experts]`` (docstring of ``grouped_gemm_nt_masked``).
    """
    experts, rows, columns = words.shape
    whole = functional.pad(words, (0, 0, 0, -rows % 128)) if rows % 128 else words
    tiles = whole.view(experts, -1, 4, 32, columns).permute(0, 1, 4, 3, 2).contiguous()
    scales = tiles.view(torch.float8_e4m3fn).view(*tiles.shape, _SCALES_PER_FLOAT)
    return scales.permute(3, 4, 1, 5, 2, 0)


def _dispatch_can_quantise(moe: Any, quant_config: Any) -> bool:
    return bool(
        current_platform.is_cuda()
        and moe.in_dtype == torch.bfloat16
        and quant_config.quant_dtype == torch.float8_e4m3fn
        and quant_config.block_shape[1] == SCALE_GROUP
        and moe.hidden_dim % SCALE_GROUP == 0
    )


def _as_vllm_rounds_scales() -> Quantisation:
    """Return the quantisation that has the scales of vLLM's ``per_token_group_quant_fp8``."""
    return "fp8_power_of_2" if is_deep_gemm_e8m0_used() else "fp8"


def has_one_scale_for_all_rows(quant_config: Any) -> bool:
    """Return whether ``quantize`` makes one scale of all the rows it gets."""
    return (
        isinstance(quant_config.quant_dtype, torch.dtype)  # formats that have names have scales of blocks
        and quant_config.a1_scale is None
        and not quant_config.per_act_token_quant
        and not quant_config.is_block_quantized
    )


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
