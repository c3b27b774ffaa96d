"""What vLLM's MoE layers must know about our backends, patched in the workers that use them."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin import fault_tolerance, seams
from vllm_efa_ep.vllm_plugin.backend_names import (
    BACKEND_NAMES,
    HIGH_THROUGHPUT,
    LOW_LATENCY,
    is_selected,
)
from vllm_efa_ep.vllm_plugin.config_patches import extend_property

_applied = False


def apply() -> None:
    """Patch the MoE layers; safe to repeat.

    Raises:
        VllmSeamError: The installed vLLM looks different where we must touch it.

    """
    global _applied
    if _applied:
        return
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    seams.require([*seams.MOE_SEAMS, *(seams.CPU_MOE_SEAMS if on_cpu else seams.CUDA_MOE_SEAMS)])
    _announce_formats()
    _provide_prepare_finalize()
    _move_experts()
    if on_cpu:
        _hide_experts_from_dynamo()
        _offer_cpu_batched_experts()
    _applied = True


def _move_experts() -> None:
    from vllm_efa_ep.vllm_plugin import eplb

    eplb.apply()


def make_manager(parallel_config: Any, cpu_group: Any, tcp_store_group: Any) -> Any:
    """Return the all-to-all manager of an EP communicator.

    Raises:
        ConfigurationError: The combination of options has no use for, or is not supported by, us.

    """
    from vllm.platforms import current_platform

    from vllm_efa_ep.vllm_plugin.manager import EfaEpAll2AllManager

    name = parallel_config.all2all_backend
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ConfigurationError(
            f"--all2all-backend {name} runs on NVIDIA GPUs and on CPUs, not on "
            f"{current_platform.device_name}; choose another backend"
        )
    if not parallel_config.enable_expert_parallel:
        raise ConfigurationError(
            f"--all2all-backend {name} needs --enable-expert-parallel: without it the experts are not "
            "distributed and there is nothing to exchange; add that flag or choose another backend"
        )
    if tcp_store_group is not None:
        raise ConfigurationError(
            f"--all2all-backend {name} does not support elastic expert parallelism; "
            "remove --enable-elastic-ep"
        )
    return EfaEpAll2AllManager(cpu_group, fault_tolerance.is_wanted(parallel_config))


def _announce_formats() -> None:
    """Announce the batched format and the routing tables before a prepare/finalize object exists.

    CUDA experts of the Standard format take global ids, and some of them to be consecutive on each rank, so
    vLLM keeps to linear placement there, as with its own backends.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
    from vllm.platforms import current_platform

    round_robin = BACKEND_NAMES if current_platform.is_cpu() else (LOW_LATENCY,)

    extend_property(
        FusedMoEParallelConfig,
        "use_batched_activation_format",
        lambda config: config.use_all2all_kernels and config.all2all_backend == LOW_LATENCY,
    )
    extend_property(
        FusedMoEParallelConfig,
        "needs_round_robin_routing_tables",
        lambda config: config.use_all2all_kernels and config.all2all_backend in round_robin,
    )
    # By this, batched experts decide whether VLLM_DEEPEPLL_NVFP4_DISPATCH concerns them. The property of the
    # same name in FusedMoEParallelConfig would also have hidden sizes rounded up to those DeepEP has.
    extend_property(
        FusedMoEConfig,
        "use_deepep_ll_kernels",
        lambda moe: (
            moe.moe_parallel_config.use_all2all_kernels
            and moe.moe_parallel_config.all2all_backend == LOW_LATENCY
        ),
    )


def _make_prepare_finalize(moe: Any, quant_config: Any, routing_tables: Any, manager: Any) -> Any:
    from vllm_efa_ep.vllm_plugin.high_throughput import HighThroughputPrepareFinalize
    from vllm_efa_ep.vllm_plugin.low_latency import LowLatencyPrepareFinalize

    low_latency = moe.moe_parallel_config.all2all_backend == LOW_LATENCY
    implementation = LowLatencyPrepareFinalize if low_latency else HighThroughputPrepareFinalize
    return implementation(manager, moe, quant_config, round_robin=routing_tables is not None)


def _provide_prepare_finalize() -> None:
    """Register our prepare/finalize objects, or wrap vLLM's choice where it has no registry yet."""
    from vllm.model_executor.layers.fused_moe import all2all_utils

    if hasattr(all2all_utils, "register_moe_prepare_finalize_factory"):
        _register_factories(all2all_utils.register_moe_prepare_finalize_factory)
        return
    original = all2all_utils.maybe_make_prepare_finalize
    signature = inspect.signature(original)

    @functools.wraps(original)
    def maybe_make_prepare_finalize(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        moe = call.arguments["moe"]
        parallel = moe.moe_parallel_config
        if not (parallel.use_all2all_kernels and is_selected(parallel)):
            return original(*args, **kwargs)
        if call.arguments.get("use_monolithic", False):
            raise ConfigurationError(
                f"--all2all-backend {parallel.all2all_backend} needs modular expert kernels, but vLLM chose "
                "a monolithic one; choose another --moe-backend"
            )
        manager = call.arguments.get("all2all_manager") or all2all_utils.get_ep_all2all_manager()
        return _make_prepare_finalize(
            moe, call.arguments["quant_config"], call.arguments.get("routing_tables"), manager
        )

    # Other modules of vLLM import the function by name.
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm.") and (
            getattr(module, "__dict__", {}).get("maybe_make_prepare_finalize") is original
        ):
            module.maybe_make_prepare_finalize = maybe_make_prepare_finalize  # type: ignore[attr-defined]


def _register_factories(register: Callable[[type], Any]) -> None:
    """Register with vLLM's registry of prepare/finalize factories (vLLM pull request 50556)."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareFinalizeFactory

    class HighThroughputFactory(MoEPrepareFinalizeFactory):  # type: ignore[misc]
        backend_name = HIGH_THROUGHPUT
        supports_sequence_parallel = True

        @classmethod
        def create(cls, *, moe: Any, quant_config: Any, all2all_manager: Any, **options: Any) -> Any:
            return _make_prepare_finalize(moe, quant_config, options.get("routing_tables"), all2all_manager)

    class LowLatencyFactory(HighThroughputFactory):
        backend_name = LOW_LATENCY

    register(HighThroughputFactory)
    register(LowLatencyFactory)


def _hide_experts_from_dynamo() -> None:
    """Run the MoE layer as one opaque operator on CPU, as vLLM does on GPUs.

    vLLM's CPU platform calls it as plain Python; Dynamo would trace into prepare/finalize and stop at
    the shapes that depend on the routing.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    original = MoERunner._select_forward

    @functools.wraps(original)
    def select_forward(self: Any) -> Any:
        parallel = self.moe_config.moe_parallel_config
        if not (parallel.use_all2all_kernels and is_selected(parallel)):
            return original(self)
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    MoERunner._select_forward = select_forward


def _offer_cpu_batched_experts() -> None:
    """Add experts for the batched format to those vLLM chooses from on CPU; it has none."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    original = unquantized.backend_to_kernel_cls

    @functools.wraps(original)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        kernels: list[type] = original(backend)
        if backend == unquantized.UnquantizedMoeBackend.CPU:
            from vllm_efa_ep.vllm_plugin.cpu_batched_experts import CpuBatchedExperts

            kernels = [*kernels, CpuBatchedExperts]
        return kernels

    unquantized.backend_to_kernel_cls = backend_to_kernel_cls
