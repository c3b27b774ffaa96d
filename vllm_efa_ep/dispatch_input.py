"""What ``dispatch_send`` is given, checked, and as the halves take it."""

from dataclasses import dataclass

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.argument_checks import EXCHANGE, aligned, check, checked
from vllm_efa_ep.errors import ConfigurationError

# Of the halves' dispatch_send after the channel: x, x_stride, scales, ids, ids_are_64_bit, weights, tokens,
# token_count (``rank_memory.Halves``).
Arguments = tuple[int, int, int, int, bool, int, int, int]


def dispatch_glance(
    config: AllToAllConfig, device: torch.device, in_place: torch.Tensor | None
) -> _core.DispatchGlance:
    """Return what reads the tensors of a channel that a round can take as they are.

    It reads what ``DispatchInput.of(...).arguments()`` would, or returns None if a tensor has to be copied or
    refused.
    """
    sample = torch.empty((0, config.columns), dtype=config.input_dtype, device=device)
    return _core.DispatchGlance(
        exchange=EXCHANGE,
        x=sample if in_place is None else in_place,
        in_place=in_place is not None,
        top_k=config.top_k,
        scale_columns=config.scale_columns,
    )


@dataclass(frozen=True)
class DispatchInput:
    """Tokens of one round. The tensors must live until the half has read them."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    count: torch.Tensor | None

    @classmethod
    def of(
        cls,
        config: AllToAllConfig,
        device: torch.device,
        in_place: torch.Tensor | None,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None,
        count: torch.Tensor | None,
    ) -> "DispatchInput":
        """Check everything but the values; ``in_place`` is the channel's ``activations()``, if it has any.

        Raises:
            ConfigurationError: A shape, dtype or device is wrong; the message names it and the remedy.

        """
        tokens = x.shape[0] if x.ndim > 0 else 0
        check("x", x, (tokens, config.columns), (config.input_dtype,), device)
        x = aligned(x) if in_place is None else _where_it_may_stay(x, in_place)
        shape = (tokens, config.top_k)
        topk_ids = checked("topk_ids", topk_ids, shape, (torch.int32, torch.int64), device)
        topk_weights = checked("topk_weights", topk_weights, shape, (torch.float32,), device)
        if (scales is not None) != (config.scale_columns > 0):
            raise ConfigurationError(
                f"scales are {'given' if scales is not None else 'missing'}, but scale_columns is "
                f"{config.scale_columns}; pass float32 scales [tokens, scale_columns] exactly if it is not 0"
            )
        if scales is not None:
            scales = checked("scales", scales, (tokens, config.scale_columns), (torch.float32,), device)
        if count is not None:
            check("count", count, (1,), (torch.int32,), device)
        return cls(x, scales, topk_ids, topk_weights, count)

    def arguments(self) -> Arguments:
        """Return what the halves' ``dispatch_send`` takes after the channel."""
        return (
            self.x.data_ptr(),
            self.x.stride(0) * self.x.itemsize,
            self.scales.data_ptr() if self.scales is not None else 0,
            self.topk_ids.data_ptr(),
            self.topk_ids.dtype == torch.int64,
            self.topk_weights.data_ptr(),
            self.x.shape[0],
            self.count.data_ptr() if self.count is not None else 0,
        )


def _where_it_may_stay(x: torch.Tensor, in_place: torch.Tensor) -> torch.Tensor:
    """Return ``x`` if it is the first rows of ``in_place``, else rows side by side that are no part of it."""
    offset = x.data_ptr() - in_place.data_ptr()
    if offset == 0 and x.stride() == in_place.stride():
        return x
    if 0 <= offset < in_place.shape[0] * in_place.stride(0) * in_place.itemsize:
        # Dispatch writes rows there while it reads others of x.
        return x.clone(memory_format=torch.contiguous_format)
    return aligned(x)
