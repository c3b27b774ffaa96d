"""Backend ``efa_ep_low_latency``: vLLM's BatchedExperts format, fixed shapes, for decoding."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate
from vllm.model_executor.layers.fused_moe.utils import normalize_batched_scales_shape

from vllm_efa_ep.all_to_all import Dispatched
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin import wire_format
from vllm_efa_ep.vllm_plugin.prepare_finalize import EfaEpPrepareFinalize, PrepareResult
from vllm_efa_ep.vllm_plugin.wire_format import NVFP4_VALUES_PER_WORD


class LowLatencyPrepareFinalize(EfaEpPrepareFinalize):
    """One row per (token, expert) in ``[local experts, capacity, H]``; weights applied in combine."""

    layout = "per_expert"

    @property
    def activation_format(self) -> Any:
        """Rows grouped by local expert."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self) -> int | None:
        """Return the most tokens a rank may dispatch at once; times the ranks it is the capacity."""
        return int(self._moe.max_num_tokens)

    def _takes_byte_scales(self, fused_experts: Any) -> bool:
        # vLLM's batched experts quantise by themselves, but for those told to expect it of DeepEP.
        takes_fp4 = bool(getattr(fused_experts, "use_deep_ep_ll_nvfp4_dispatch", False))
        if takes_fp4 and self._moe.hidden_dim % NVFP4_VALUES_PER_WORD:
            raise ConfigurationError(
                f"VLLM_DEEPEPLL_NVFP4_DISPATCH=1 needs a hidden size that is a multiple of "
                f"{NVFP4_VALUES_PER_WORD}, not {self._moe.hidden_dim}; unset it"
            )
        return takes_fp4

    def _expert_input(
        self, dispatched: Dispatched, scales: torch.Tensor | None, quant_config: Any, quantize: bool
    ) -> PrepareResult:
        rows = dispatched.x
        # vLLM's batched experts for fp4 quantise by themselves.
        if quantize and quant_config.quant_dtype not in (None, "nvfp4"):
            num_experts, capacity, _ = rows.shape
            if wire_format.has_one_scale_for_all_rows(quant_config):
                # Unused rows hold what earlier rounds left there, or what memory held before us.
                used = dispatched.tokens_per_expert.unsqueeze(1)
                unused = torch.arange(capacity, device=rows.device) >= used
                rows.masked_fill_(unused.unsqueeze(2), 0)
            flat, scales = wire_format.quantize(rows.flatten(0, 1), quant_config, swizzled=False)
            rows = flat.view(num_experts, -1, flat.shape[-1])
            scales = normalize_batched_scales_shape(scales, num_experts)
        tokens = mk.ExpertTokensMetadata(
            expert_num_tokens=dispatched.tokens_per_expert, expert_num_tokens_cpu=None
        )
        return rows, scales, tokens, None, None

    def _expert_output(
        self,
        rows: torch.Tensor,
        output: torch.Tensor,  # noqa: ARG002
        weight_and_reduce_impl: Any,
    ) -> tuple[torch.Tensor, bool]:
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            return rows, False
        raise ConfigurationError(
            f"the expert kernel leaves {type(weight_and_reduce_impl).__name__} to do, but "
            "efa_ep_low_latency weights and reduces in combine; choose another --moe-backend"
        )
