"""A rank of vLLM with its groups, and MoE kernels as vLLM builds them."""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import reference_moe
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_efa_ep.vllm_plugin.backend_names import LOW_LATENCY

RANKS = 4
EXPERTS, MAX_TOKENS = 8, 8


@dataclass(frozen=True)
class Kernel:
    """A ``FusedMoEKernel`` with what vLLM's layer passes it."""

    kernel: Any
    expert_map: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def __call__(self, tokens: reference_moe.Tokens, **options: Any) -> torch.Tensor:
        """Run the layer."""
        options = {"apply_router_weight_on_input": False, **options}
        result: torch.Tensor = self.kernel.apply(
            tokens.x,
            self.gate_up,
            self.down,
            tokens.weights,
            tokens.ids,
            MoEActivation.SILU,
            EXPERTS,
            self.expert_map,
            **options,
        )
        return result


class VllmRank:
    """vLLM's groups on one rank; data parallel, with the experts on all ranks."""

    def __init__(self, rank: int, ranks: int, store_port: int) -> None:
        """Collective: let vLLM build its groups, and with them our manager."""
        self.rank, self._ranks, self._store_port = rank, ranks, store_port
        self._stack = ExitStack()
        with set_current_vllm_config(self.config(LOW_LATENCY)):
            parallel_state.init_distributed_environment(1, 0, local_rank=0, backend="gloo")
            parallel_state.initialize_model_parallel(backend="gloo")
        init_workspace_manager(torch.device("cpu"), num_ubatches=2)

    def __enter__(self) -> "VllmRank":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close as vLLM's workers do."""
        if kind is None:
            parallel_state.destroy_model_parallel()

    def config(self, backend: str, **options: Any) -> VllmConfig:
        """Return what vLLM makes of the command line's options."""
        parallel_config = ParallelConfig(
            data_parallel_size=self._ranks,
            data_parallel_size_local=self._ranks,
            data_parallel_rank=self.rank,
            data_parallel_master_ip="127.0.0.1",
            enable_expert_parallel=True,
            all2all_backend=backend,
            **options,
        )
        parallel_config._coord_store_port = self._store_port
        return VllmConfig(parallel_config=parallel_config)

    @property
    def manager(self) -> Any:
        """Our manager, where vLLM looks for it."""
        return all2all_utils.get_ep_all2all_manager()

    def build(
        self,
        backend: str,
        experts: type,
        layer: reference_moe.Layer,
        *,
        top_k: int = 3,
        quant_config: Any = FUSED_MOE_UNQUANTIZED_CONFIG,
        placement: str = "linear",
        hidden: int = reference_moe.HIDDEN,
        config: VllmConfig | None = None,
    ) -> Kernel:
        """Build a layer's kernel as vLLM's quantisation methods do."""
        vllm_config = config or self.config(backend)
        with set_current_vllm_config(vllm_config):
            parallel = FusedMoEParallelConfig.make(
                1, 1, self._ranks, sp_size_=1, vllm_parallel_config=vllm_config.parallel_config
            )
            placed = ExpertMapManager(
                MAX_TOKENS,
                top_k,
                EXPERTS,
                num_redundant_experts=0,
                num_expert_group=2,
                moe_parallel_config=parallel,
                placement_strategy=placement,
                enable_eplb=False,
            )
            moe = FusedMoEConfig(
                num_experts=EXPERTS,
                experts_per_token=top_k,
                hidden_dim=hidden,
                intermediate_size=reference_moe.INTERMEDIATE,
                num_local_experts=placed.local_num_experts,
                num_logical_experts=EXPERTS,
                activation=MoEActivation.SILU,
                device="cpu",
                routing_method=RoutingMethodType.TopK,
                moe_parallel_config=parallel,
                in_dtype=torch.bfloat16,
                max_num_tokens=MAX_TOKENS,
            )
            prepare_finalize = all2all_utils.maybe_make_prepare_finalize(
                moe, quant_config, routing_tables=placed.routing_tables, allow_new_interface=True
            )
            room = {}
            if experts.activation_format() == mk.FusedMoEActivationFormat.BatchedExperts:
                room = {
                    "max_num_tokens": prepare_finalize.max_num_tokens_per_rank(),
                    "num_dispatchers": prepare_finalize.num_dispatchers(),
                }
            kernel = mk.FusedMoEKernel(prepare_finalize, experts(moe, quant_config, **room))
        own = (placed.expert_map >= 0).nonzero().flatten()
        own = own[placed.expert_map[own].argsort()]
        return Kernel(kernel, placed.expert_map, layer.gate_up[own], layer.down[own])
