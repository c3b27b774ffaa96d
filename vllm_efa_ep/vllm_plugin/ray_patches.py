"""What vLLM's Ray executor lacks for us: our settings in the workers, and CPU hosts as places for workers."""

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


def place_on_cpu_hosts(parallel_config: Any) -> None:
    """Let Ray place CPU workers for this configuration, which vLLM refuses: "does not support ray"."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or parallel_config.distributed_executor_backend != "ray":
        return
    seams.require(seams.CPU_RAY_SEAMS)
    from vllm_efa_ep.vllm_plugin.cpu_ray_executor import CpuRayExecutor, declare_resource

    declare_resource()  # here, for the placement of data-parallel ranks
    parallel_config.distributed_executor_backend = CpuRayExecutor
