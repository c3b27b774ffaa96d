"""Which bootstrap the ranks of a torch process group use: the one place that decides."""

import json
import sys

import torch.distributed as dist

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError


def choose_bootstrap(group: dist.ProcessGroup, settings: Settings) -> Bootstrap:
    """Collective: return the same kind of bootstrap on all ranks, as ``EFA_EP_BOOTSTRAP`` says.

    With Ray, what the ranks publish while one of them fails does not depend on the process that hosts the
    group's store. The run's token is the group's (``TorchBootstrap``).

    Raises:
        ConfigurationError: Ray was asked for and not all ranks are Ray workers, or the ranks ask for
            different bootstraps.

    """
    over_group = TorchBootstrap(group, settings=settings)
    told = over_group.all_gather(json.dumps([settings.bootstrap, _is_ray_worker()]).encode())
    wanted, on_ray = zip(*map(json.loads, told), strict=True)
    if len(set(wanted)) > 1:
        raise ConfigurationError(
            f"ranks disagree about EFA_EP_BOOTSTRAP: {', '.join(wanted)} in rank order; set it on all hosts"
        )
    if settings.bootstrap == "ray" and not all(on_ray):
        others = [rank for rank, each in enumerate(on_ray) if not each]
        raise ConfigurationError(
            f"EFA_EP_BOOTSTRAP=ray, but ranks {others} are no Ray workers; start vLLM with "
            "--data-parallel-backend ray or --distributed-executor-backend ray"
        )
    if settings.bootstrap == "torch" or not all(on_ray):
        return over_group
    from vllm_efa_ep.bootstrap.ray import RayBootstrap

    bootstrap = RayBootstrap(
        over_group.run, over_group.rank, over_group.world_size, host_timeout_s=settings.host_timeout_s
    )
    bootstrap.compare_hosts(settings)
    return bootstrap


def _is_ray_worker() -> bool:
    ray = sys.modules.get("ray")  # a Ray worker has imported it long ago
    return ray is not None and bool(ray.is_initialized())
