"""What vLLM lacks for us on Ray: our settings in the workers, workers on CPU hosts, an end when one fails."""

import functools
from typing import Any

from vllm_efa_ep.config import SETTINGS
from vllm_efa_ep.vllm_plugin import seams

_STATS_DIR = "EFA_EP_STATS_DIR"
_LIBFABRIC_PREFIX = "FI_"

CPU_RESOURCE = "GPU"
"""What a worker takes of a CPU host: ``ray start --num-gpus N`` declares places for N ranks.

vLLM asks Ray for the accelerator ids of the resource, and Ray has ids of its own kinds of accelerators only.
"""


def copy_settings() -> None:
    """Let vLLM copy our settings, and libfabric's, from ``vllm serve`` to its data-parallel engines on Ray.

    What is copied replaces what a host has, so not those that name something of one host. But engines beside
    the server have to know the directory that its /metrics reads.
    """
    from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES, DEFAULT_EXTRA_ENV_VARS

    DEFAULT_ENV_VAR_PREFIXES.add(_LIBFABRIC_PREFIX)
    DEFAULT_EXTRA_ENV_VARS.update(each.variable for each in SETTINGS if not each.of_one_host)
    DEFAULT_EXTRA_ENV_VARS.add(_STATS_DIR)


def prepare(config: Any) -> None:
    """Patch what a ``VllmConfig`` with one of our backends needs on Ray."""
    if config.parallel_config.data_parallel_backend == "ray":
        seams.require(seams.RAY_ENGINE_SEAMS)
        notice_failed_engines()
    place_on_cpu_hosts(config)


def place_on_cpu_hosts(config: Any) -> None:
    """Let Ray place the CPU workers of a ``VllmConfig``, which vLLM refuses: "does not support ray"."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or config.parallel_config.distributed_executor_backend != "ray":
        return
    from vllm.v1.executor.abstract import Executor

    if Executor.get_class(config).__name__ != "RayExecutorV2":
        return  # vLLM 0.32's older executor, which is gone from 0.33
    seams.require(seams.CPU_RAY_SEAMS)
    from vllm_efa_ep.vllm_plugin.cpu_ray_executor import CpuRayExecutor

    declare_cpu_resource()  # here, for the placement of data-parallel ranks
    config.parallel_config.distributed_executor_backend = CpuRayExecutor


def declare_cpu_resource() -> None:
    """Tell vLLM in this process which Ray resource stands for a place on a CPU host."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = CPU_RESOURCE


def notice_failed_engines() -> None:
    """Let the API server end when an engine fails, as it does without Ray; safe to repeat.

    vLLM expects the end of an engine's actor there. An engine that raises, as ours do when a rank is lost,
    ends the thread that watches instead, and everybody who asks the server waits for ever.
    """
    import ray
    from vllm.v1.engine.utils import CoreEngineActorManager

    original = CoreEngineActorManager.monitor_engine_liveness
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def monitor_engine_liveness(self: Any) -> None:
        try:
            original(self)
        except ray.exceptions.RayTaskError as error:
            self.failed_proc_name = f"engine ({error.cause})"
            self.shutdown()

    CoreEngineActorManager.monitor_engine_liveness = monitor_engine_liveness
