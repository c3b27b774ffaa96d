"""Experts for the batched format on CPU, which vLLM lacks."""

# The signatures are vLLM's.
# ruff: noqa: ARG002, ARG004, D417, N803

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate
from vllm.platforms import current_platform

_ACTIVATIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: lambda gate: functional.gelu(gate, approximate="tanh"),
}


class CpuBatchedExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Two matrix products per local expert that received tokens, on the weights as they were loaded.

    vLLM's other CPU experts repack their weights in ``process_weights_after_loading``; these do not.
    """

    @staticmethod
    def activation_format() -> Any:
        """Rows grouped by local expert."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Return True: nothing is quantised here."""
        return True

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of two scratch buffers (none needed) and of the output."""
        return (0,), (0,), (local_num_experts, M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Leave weights and reduction to combine."""
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Run the gated MLP of each local expert.

        Args:
            output: ``[E, capacity, H]``; rows beyond an expert's count stay as they are.
            hidden_states: ``[E, capacity, H]``.
            w1: Gate and up projections, ``[E, 2 I, H]``.
            w2: Down projections, ``[E, H, I]``.
            activation: Activation of the gate.
            expert_tokens_meta: Rows per expert.

        """
        gate_activation = _ACTIVATIONS[activation]
        for expert, count in enumerate(expert_tokens_meta.expert_num_tokens.tolist()):
            if count == 0:
                continue
            bias1 = None if self.w1_bias is None else self.w1_bias[expert]
            bias2 = None if self.w2_bias is None else self.w2_bias[expert]
            gate, up = functional.linear(hidden_states[expert, :count], w1[expert], bias1).chunk(2, dim=-1)
            output[expert, :count] = functional.linear(gate_activation(gate) * up, w2[expert], bias2)
