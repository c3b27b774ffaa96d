"""Backend ``efa_ep_high_throughput``: rows in vLLM's Standard format, for prefill and large batches."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)
from vllm.platforms import current_platform

from vllm_efa_ep.all_to_all import Dispatched
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin import wire_format
from vllm_efa_ep.vllm_plugin.prepare_finalize import EfaEpPrepareFinalize, PrepareResult


class HighThroughputPrepareFinalize(EfaEpPrepareFinalize):
    """One row per (token, rank): ``[M, H]`` with all top-k ids ``[M, K]`` and weights of the token."""

    layout = "per_token"
    _local_index: torch.Tensor | None = None

    @property
    def activation_format(self) -> Any:
        """Rows of hidden states."""
        return mk.FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        """Return None: the experts need not know a bound."""
        return None

    def allocate_fused_expert_output(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, weight_and_reduce_impl: Any
    ) -> torch.Tensor | None:
        """Let experts that weight and reduce write where other ranks read, so that combine copies nothing.

        vLLM hands the tensor to ``finalize`` and keeps no reference. None lets it choose the place; on CPU
        it does so in any case.
        """
        if current_platform.is_cpu() or not isinstance(weight_and_reduce_impl, TopKWeightAndReduceNoOP):
            return None
        place = self._place_of_results()
        return place if (place.shape, place.dtype, place.device) == (shape, dtype, device) else None

    def _takes_byte_scales(self, fused_experts: Any) -> bool:  # noqa: ARG002
        return True

    def _expert_input(
        self, dispatched: Dispatched, scales: torch.Tensor | None, quant_config: Any, quantize: bool
    ) -> PrepareResult:
        rows = dispatched.x
        if quantize and rows.numel() and quant_config.quant_dtype is not None:
            ids = dispatched.topk_ids
            if ids is not None and wire_format.has_one_scale_for_all_rows(quant_config):
                # In a captured graph there is room for all rows; what did not come is whatever memory holds.
                rows.masked_fill_((ids < 0).all(1, keepdim=True), 0)
            rows, scales = wire_format.quantize(rows, quant_config, quant_config.is_scale_swizzled)
        ids, weights = dispatched.topk_ids, dispatched.topk_weights
        if current_platform.is_cpu() and ids is not None and weights is not None:
            ids, weights = self._local_slots(ids, weights)
        return rows, scales, None, ids, weights

    def _expert_output(
        self, rows: torch.Tensor, output: torch.Tensor, weight_and_reduce_impl: Any
    ) -> tuple[torch.Tensor, bool]:
        if rows.numel() == 0:
            # vLLM skips experts without input; the shape it makes up is that of the input, packed or not.
            return output.new_empty((0, output.shape[-1])), True
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceNoOP):
            return rows, True
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate | TopKWeightAndReduceContiguous):
            return rows, False
        raise ConfigurationError(
            f"the expert kernel leaves {type(weight_and_reduce_impl).__name__} to do, which "
            "efa_ep_high_throughput does not know; choose another --moe-backend"
        )

    def _local_slots(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local ids, with id 0 and weight 0 in the slots of experts elsewhere.

        The CPU kernels index their weights with the id as it is: they know neither the map of experts
        nor -1. CUDA kernels want global ids.
        """
        if self._local_index is None:
            owned = torch.tensor([owner == self._manager.rank for owner in self._owners] + [False])
            # The last entry serves id -1.
            self._local_index = torch.where(owned, owned.cumsum(0) - 1, -1).to(torch.int32)
        local = self._local_index[ids]
        return local.clamp(min=0), weights.masked_fill(local < 0, 0.0)
