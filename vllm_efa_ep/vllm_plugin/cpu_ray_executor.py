"""vLLM's Ray executor on CPU hosts, for expert parallelism without GPUs."""

from typing import Any

from vllm.v1.executor import ray_executor
from vllm.v1.executor.ray_executor import RayDistributedExecutor
from vllm.v1.executor.ray_utils import RayWorkerWrapper

from vllm_efa_ep.vllm_plugin.ray_patches import declare_cpu_resource


class CpuRayWorker(RayWorkerWrapper):  # type: ignore[misc]
    """A worker in a Ray actor on a CPU host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do what the base class does; it reads the resource before it loads plugins."""
        declare_cpu_resource()
        super().__init__(*args, **kwargs)


class CpuRayExecutor(RayDistributedExecutor):  # type: ignore[misc]
    """Starts ``CpuRayWorker`` actors."""

    def _init_executor(self) -> None:
        declare_cpu_resource()
        ray_executor.RayWorkerWrapper = CpuRayWorker
        super()._init_executor()
