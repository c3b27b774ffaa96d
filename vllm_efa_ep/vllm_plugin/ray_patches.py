"""What vLLM lacks for us on Ray: our settings in the workers, workers on CPU hosts, an end when one fails."""

import functools
import sys
from typing import Any

from vllm_efa_ep.vllm_plugin import logger, seams
from vllm_efa_ep.vllm_plugin.backend_names import is_selected

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


def end_failed_engines() -> None:
    """Let the actor of an engine end when the engine fails: the API server sees the ends of actors only.

    An engine that raises would leave it, and everybody who asks it, waiting for ever.
    """
    # Elsewhere nobody has imported it, and importing it takes seconds.
    core: Any = sys.modules.get("vllm.v1.engine.core")
    if core is None or seams.problems(seams.RAY_ENGINE_SEAMS):
        return
    original = core.DPEngineCoreProc.run_busy_loop

    @functools.wraps(original)
    def run_busy_loop(self: Any) -> None:
        try:
            original(self)
        except Exception:
            if isinstance(self, core.EngineCoreActorMixin) and is_selected(self.vllm_config.parallel_config):
                import ray

                logger.exception("EngineCore encountered a fatal error; its actor ends")
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
            raise

    core.DPEngineCoreProc.run_busy_loop = run_busy_loop
