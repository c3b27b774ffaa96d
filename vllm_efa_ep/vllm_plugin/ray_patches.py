"""What vLLM's Ray executors lack for us: our settings in the workers, and CPU hosts as places for workers."""

from typing import Any

from vllm_efa_ep.vllm_plugin import seams

SETTING_PREFIXES = ("EFA_EP_", "FI_")
"""Ours and libfabric's."""

CPU_RESOURCE = "GPU"
"""What a worker takes of a CPU host: ``ray start --num-gpus N`` declares places for N ranks.

vLLM asks Ray for the accelerator ids of the resource, and Ray has ids of its own kinds of accelerators only.
"""


def copy_settings() -> None:
    """Let vLLM copy our settings from ``vllm serve`` to the Ray workers of other hosts."""
    from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES

    DEFAULT_ENV_VAR_PREFIXES.update(SETTING_PREFIXES)


def place_on_cpu_hosts(config: Any) -> None:
    """Let Ray place the CPU workers of a ``VllmConfig``, which vLLM refuses: "does not support ray"."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or config.parallel_config.distributed_executor_backend != "ray":
        return
    from vllm.v1.executor.abstract import Executor

    executor: Any
    if Executor.get_class(config).__name__ == "RayExecutorV2":
        seams.require(seams.CPU_RAY_V2_SEAMS)
        from vllm_efa_ep.vllm_plugin.cpu_ray_executor_v2 import CpuRayExecutorV2 as executor  # noqa: N813
    else:  # vLLM 0.32, unless VLLM_USE_RAY_V2_EXECUTOR_BACKEND is set
        seams.require(seams.CPU_RAY_SEAMS)
        from vllm_efa_ep.vllm_plugin.cpu_ray_executor import CpuRayExecutor as executor  # noqa: N813
    declare_cpu_resource()  # here, for the placement of data-parallel ranks
    config.parallel_config.distributed_executor_backend = executor


def declare_cpu_resource() -> None:
    """Tell vLLM in this process which Ray resource stands for a place on a CPU host."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = CPU_RESOURCE
