"""The hosts of a Ray cluster: what each of them has, and ranks placed on them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_efa_ep.bootstrap.inventory import Inventory, take_inventory
from vllm_efa_ep.bootstrap.membership import Run
from vllm_efa_ep.bootstrap.ray import START_S, RayBootstrap
from vllm_efa_ep.errors import ConfigurationError, EfaEpError

_SETTING_PREFIXES = ("EFA_EP_", "FI_")
_INVENTORY_SECONDS = 60.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RayHost:
    """One node of the cluster.

    Attributes:
        node_id: Ray's name for it.
        address: Its IP address.
        gpus: How many GPUs Ray may use there.

    """

    node_id: str
    address: str
    gpus: int


def ray_hosts() -> list[RayHost]:
    """Return the nodes of the cluster that are alive, this process's first, then by address.

    Raises:
        ConfigurationError: This process is not connected to Ray.

    """
    if not ray.is_initialized():
        raise ConfigurationError("this process is not connected to Ray; call ray.init(address=...) before")
    own = ray.get_runtime_context().get_node_id()
    found = [
        RayHost(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return sorted(found, key=lambda host: (host.node_id != own, host.address))


def on_every_host(
    function: Callable[[], _Result], timeout_s: float = _INVENTORY_SECONDS
) -> dict[str, _Result]:
    """Run ``function`` once on each node of the cluster and return the results by address.

    Raises:
        EfaEpError: It failed on a host, or did not end in time; the message names the host.

    """
    agents = {
        host.address: ray.remote(num_cpus=0)(function)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False))
        .remote()
        for host in ray_hosts()
    }
    done, _ = ray.wait(list(agents.values()), num_returns=len(agents), timeout=timeout_s)
    late = [address for address, answer in agents.items() if answer not in done]
    if late:
        raise EfaEpError(f"no answer from hosts {', '.join(late)} within {timeout_s:g} s; see `ray status`")
    return {address: _result(f"the agent on {address}", answer) for address, answer in agents.items()}


def inventories() -> dict[str, Inventory]:
    """Return what every node of the cluster has, by address."""
    return on_every_host(take_inventory)


def run_on_ray(
    world_size: int,
    function: Callable[..., _Result],
    arguments: Sequence[Any] = (),
    *,
    gpus_per_rank: int = 0,
    start_timeout_s: float = START_S,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[_Result]:
    """Run ``function(bootstrap, *arguments)`` as ``world_size`` ranks on the cluster; return their results.

    Ranks are processes; consecutive ranks share a host, and hosts get as equal numbers as possible.

    Args:
        world_size: Number of ranks.
        function: What each rank does; gets its ``RayBootstrap`` first.
        arguments: What it gets besides.
        gpus_per_rank: GPUs that Ray reserves for each rank.
        start_timeout_s: How long ranks wait for each other before they begin.
        timeout_s: How long all of it may take; None: the function has deadlines of its own.
        environment: Variables of the ranks, besides this process's settings of ours and of libfabric.

    Raises:
        ConfigurationError: The cluster has too few GPUs.
        EfaEpError: A rank failed or did not end in time; the message names it and its host, and the others
            have been ended.

    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(_SETTING_PREFIXES)}
    run = Run.new()
    places = _places(world_size, gpus_per_rank)
    ranks: list[Any] = [
        ray.remote(_Rank)
        .options(
            num_cpus=0,
            num_gpus=gpus_per_rank,
            scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False),
            runtime_env={"env_vars": {**variables, **(environment or {})}},
        )
        .remote()
        for host in places
    ]
    try:
        answers = {
            each.run.remote(run, rank, world_size, start_timeout_s, function, tuple(arguments)): rank
            for rank, each in enumerate(ranks)
        }
        results: dict[int, _Result] = {}
        waiting = list(answers)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=timeout_s)
            if not done:
                late = sorted(answers[each] for each in waiting)
                raise EfaEpError(f"ranks {late} did not end within {timeout_s:g} s")
            for answer in done:
                rank = answers[answer]
                results[rank] = _result(f"rank {rank} on {places[rank].address}", answer)
        return [results[rank] for rank in range(world_size)]
    finally:
        for each in ranks:
            ray.kill(each)


class _Rank:
    """One rank's process."""

    def run(
        self,
        run: Run,
        rank: int,
        world_size: int,
        timeout_s: float,
        function: Callable[..., _Result],
        arguments: tuple[Any, ...],
    ) -> _Result:
        bootstrap = RayBootstrap(run, rank, world_size, timeout_s=timeout_s)
        result = function(bootstrap, *arguments)
        bootstrap.close()
        return result


def _places(world_size: int, gpus_per_rank: int) -> list[RayHost]:
    """Return the host of every rank."""
    hosts = ray_hosts()
    share, rest = divmod(world_size, len(hosts))
    counts = [share + (number < rest) for number in range(len(hosts))]
    for host, count in zip(hosts, counts, strict=True):
        if host.gpus < count * gpus_per_rank:
            raise ConfigurationError(
                f"{count} of {world_size} ranks would run on {host.address}, which has {host.gpus} GPUs for "
                f"Ray and needs {count * gpus_per_rank}; use fewer ranks or more hosts"
            )
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


def _result(who: str, answer: "ray.ObjectRef[Any]") -> Any:
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise EfaEpError(f"{who} failed: {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise EfaEpError(f"{who} ended: {error}") from error
