"""The places in vLLM that this plugin touches, and the check that they still look as expected.

vLLM has no official hook for an all-to-all backend from outside, so the plugin wraps a few of its
functions. Each is listed here with what the wrapper relies on. A vLLM in which a seam looks different
is left alone; selecting our backend there raises ``VllmSeamError``.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_efa_ep.errors import VllmSeamError

SUPPORTED_VLLM = "0.32 and 0.33"

_MOE = "vllm.model_executor.layers.fused_moe"
_COMMUNICATORS = "vllm.distributed.device_communicators"


@dataclass(frozen=True)
class Seam:
    """One attribute of vLLM.

    Attributes:
        module: Module that holds it.
        attribute: Dotted path inside the module.
        parameters: Parameters that the callable must accept by name.

    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Return what is wrong with the seam in the installed vLLM, or ``None``."""
        where = f"{self.module}.{self.attribute}"
        try:
            found: Any = importlib.import_module(self.module)
        except ImportError as error:
            return f"{where}: the module cannot be imported ({error})"
        for name in self.attribute.split("."):
            if not hasattr(found, name):
                return f"{where} does not exist"
            found = getattr(found, name)
        if not self.parameters:
            return None
        accepted = inspect.signature(found).parameters
        missing = [name for name in self.parameters if name not in accepted]
        return f"{where} has no parameter {', '.join(missing)}" if missing else None


CONFIG_SEAMS = (
    Seam("vllm.config.parallel", "All2AllBackend"),
    Seam("vllm.config.parallel", "ParallelConfig.use_sequence_parallel_moe"),
    Seam("vllm.config.parallel", "ParallelConfig.use_batched_dp_moe"),
    Seam("vllm.config.parallel", "ParallelConfig.use_all2all"),
    Seam("vllm.config.vllm", "VllmConfig.__post_init__"),
    Seam("vllm.config.vllm", "VllmConfig.use_v2_model_runner"),
    Seam("vllm.engine.arg_utils", "_compute_kwargs.cache_clear"),
    Seam("vllm.engine.arg_utils", "EngineArgs.__init__", ("all2all_backend",)),
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Seam("vllm.ray.ray_env", "DEFAULT_ENV_VAR_PREFIXES"),
    Seam("vllm.ray.ray_env", "DEFAULT_EXTRA_ENV_VARS"),
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "DeviceCommunicatorBase.destroy", ("self",)),
)
"""Used by ``config_patches``, in every vLLM process."""

CPU_COMMUNICATOR_SEAM = Seam(
    f"{_COMMUNICATORS}.cpu_communicator",
    "CpuCommunicator.__init__",
    ("cpu_group", "unique_name", "use_all2all"),
)
CUDA_COMMUNICATOR_SEAM = Seam(
    f"{_COMMUNICATORS}.cuda_communicator",
    "CudaCommunicator.__init__",
    ("cpu_group", "unique_name", "use_all2all", "tcp_store_group"),
)

_PREPARE = (
    "a1",
    "topk_weights",
    "topk_ids",
    "num_experts",
    "expert_map",
    "apply_router_weight_on_input",
    "quant_config",
    "defer_input_quant",
)
_FINALIZE = (
    "output",
    "fused_expert_output",
    "topk_weights",
    "topk_ids",
    "apply_router_weight_on_input",
    "weight_and_reduce_impl",
)

_EPLB = "vllm.distributed.eplb"

MOE_SEAMS = (
    Seam(
        f"{_EPLB}.eplb_state",
        "create_eplb_communicator",
        ("group_coordinator", "backend", "expert_weights", "expert_buffer"),
    ),
    Seam(f"{_EPLB}.eplb_communicator", "EplbCommunicator.add_recv", ("tensors", "src_rank", "expert_id")),
    Seam(f"{_EPLB}.eplb_communicator", "EplbCommunicator.set_transfer_context", ("old_indices", "layer_idx")),
    Seam(f"{_EPLB}.eplb_communicator", "EplbCommunicator.set_stream", ("stream",)),
    Seam("vllm.utils.gpu_sync_debug", "gpu_sync_allowed"),
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.get_handle", ("kwargs",)),
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.destroy"),
    Seam(f"{_MOE}.all2all_utils", "get_ep_all2all_manager"),
    Seam(f"{_MOE}.all2all_utils", "maybe_make_prepare_finalize", ("moe", "quant_config", "routing_tables")),
    Seam(f"{_MOE}.config", "FusedMoEParallelConfig.use_all2all_kernels"),
    Seam(f"{_MOE}.config", "FusedMoEParallelConfig.use_batched_activation_format"),
    Seam(f"{_MOE}.config", "FusedMoEConfig.use_deepep_ll_kernels"),
    Seam(f"{_MOE}.config", "FusedMoEParallelConfig.needs_round_robin_routing_tables"),
    Seam(f"{_MOE}.modular_kernel", "FusedMoEPrepareAndFinalizeModular.prepare_async", _PREPARE),
    Seam(f"{_MOE}.modular_kernel", "FusedMoEPrepareAndFinalizeModular.finalize_async", _FINALIZE),
    Seam(f"{_MOE}.modular_kernel", "FusedMoEPrepareAndFinalizeModular.post_init_setup", ("fused_experts",)),
    Seam(f"{_MOE}.modular_kernel", "FusedMoEExpertsModular.expects_unquantized_inputs"),
    Seam(
        f"{_MOE}.modular_kernel",
        "ExpertTokensMetadata",
        ("expert_num_tokens", "expert_num_tokens_cpu"),
    ),
    Seam(f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceNoOP"),
    Seam(f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceContiguous"),
    Seam(f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceDelegate"),
    Seam(
        f"{_MOE}.utils",
        "moe_kernel_quantize_input",
        (
            *("A", "A_scale", "quant_dtype", "per_act_token_quant", "block_shape"),
            *("is_scale_swizzled", "mx_alignment"),
        ),
    ),
    Seam("vllm.utils.deep_gemm", "is_deep_gemm_e8m0_used"),
    Seam(f"{_MOE}.config", "FusedMoEQuantConfig.a1_gscale"),
    Seam(f"{_MOE}.config", "FusedMoEQuantConfig.is_scale_swizzled"),
    Seam(f"{_MOE}.config", "FusedMoEQuantConfig.mx_alignment"),
    Seam(f"{_MOE}.utils", "normalize_batched_scales_shape", ("scales", "num_experts")),
    Seam("vllm.v1.worker.ubatching", "dbo_current_ubatch_id"),
    Seam("vllm.v1.worker.ubatching", "dbo_maybe_run_recv_hook"),
)
"""Used by ``moe_patches``, only in workers whose configuration selects one of our backends."""

_FAULT_QUERIES = (
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.query_active_mask"),
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.query_fault"),
)

CUDA_MOE_SEAMS = (
    *_FAULT_QUERIES,
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.max_sms_used"),
    Seam("vllm.utils.flashinfer", "nvfp4_block_scale_interleave"),
)
"""Used by the manager and ``wire_format`` on the CUDA platform."""

FAULT_TOLERANCE_SEAMS = (
    *_FAULT_QUERIES,
    Seam("vllm.v1.worker.worker_base", "WorkerBase.__init__", ("self",)),
    Seam("vllm.v1.worker.sentinel.gpu_worker_sentinel", "FT_BACKEND_SET"),
    Seam(f"{_COMMUNICATORS}.base_device_communicator", "All2AllManagerBase.clean_buffers"),
)
"""Used by ``fault_tolerance`` and the manager, only with ``--enable-fault-tolerance``."""

CPU_MOE_SEAMS = (
    Seam(f"{_MOE}.runner.moe_runner", "MoERunner._select_forward", ("self",)),
    Seam(f"{_MOE}.oracle.unquantized", "backend_to_kernel_cls", ("backend",)),
    Seam(f"{_MOE}.oracle.unquantized", "UnquantizedMoeBackend.CPU"),
    Seam(f"{_MOE}.activation", "MoEActivation.SILU"),
)
"""Used by ``moe_patches`` on the CPU platform."""

RAY_ENGINE_SEAMS = (
    Seam("vllm.v1.engine.utils", "CoreEngineActorManager.monitor_engine_liveness", ("self",)),
    Seam("vllm.v1.engine.utils", "CoreEngineActorManager.shutdown", ("self",)),
)
"""Used by ``ray_patches`` for data-parallel engines on Ray."""

CPU_RAY_SEAMS = (
    Seam("vllm.platforms.interface", "Platform.ray_device_key"),
    Seam("vllm.v1.executor.ray_executor_v2", "RayExecutorV2._init_executor", ("self",)),
    Seam("vllm.v1.executor.ray_executor_v2", "RayWorkerProc"),
)
"""Used by ``cpu_ray_executor``."""


def platform_seams() -> tuple[Seam, ...]:
    """Return every seam that the plugin uses on this platform, with Ray's where Ray is installed."""
    from vllm.platforms import current_platform

    used = [*CONFIG_SEAMS, *MOE_SEAMS, *FAULT_TOLERANCE_SEAMS]
    with_ray = importlib.util.find_spec("ray") is not None
    if with_ray:
        used += RAY_ENGINE_SEAMS
    if current_platform.is_cpu():
        used += [CPU_COMMUNICATOR_SEAM, *CPU_MOE_SEAMS, *(CPU_RAY_SEAMS if with_ray else ())]
    else:
        used += [CUDA_COMMUNICATOR_SEAM, *CUDA_MOE_SEAMS]
    return tuple(dict.fromkeys(used))  # some are used in two places


def problems(seams: Iterable[Seam]) -> list[str]:
    """Return one sentence for each seam that does not look as expected."""
    return [problem for seam in seams if (problem := seam.problem())]


def seam_error(found_problems: Iterable[str]) -> VllmSeamError:
    """Return the error for a vLLM in which our backends cannot work."""
    import vllm

    version = getattr(vllm, "__version__", "of unknown version")
    return VllmSeamError(
        f"vllm-efa-ep cannot work with the installed vLLM {version}: {'; '.join(found_problems)}. "
        f"Supported are vLLM {SUPPORTED_VLLM}; install one of them, or choose another --all2all-backend "
        "and unset EFA_EP_BACKEND."
    )


def require(seams: Iterable[Seam]) -> None:
    """Raise ``VllmSeamError`` unless every seam looks as expected."""
    found = problems(seams)
    if found:
        raise seam_error(found)
