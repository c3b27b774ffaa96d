"""vLLM's Ray executor on CPU hosts, for expert parallelism without GPUs."""

from typing import Any

from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from vllm_efa_ep.vllm_plugin.ray_patches import declare_cpu_resource


class CpuRayWorkerProc(RayWorkerProc):  # type: ignore[misc]
    """A worker in a Ray actor on a CPU host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do what the base class does; it reads the resource before it loads plugins."""
        declare_cpu_resource()
        super().__init__(*args, **kwargs)


class CpuRayExecutor(RayExecutorV2):  # type: ignore[misc]
    """Starts ``CpuRayWorkerProc`` actors."""

    def _init_executor(self) -> None:
        declare_cpu_resource()
        ray_executor_v2.RayWorkerProc = CpuRayWorkerProc
        super()._init_executor()
