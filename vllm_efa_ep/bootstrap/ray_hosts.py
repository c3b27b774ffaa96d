"""The hosts of a Ray cluster: what each of them has, and ranks placed on them."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_efa_ep.bootstrap.coordinator import digest_of
from vllm_efa_ep.bootstrap.inventory import Inventory, take_inventory
from vllm_efa_ep.bootstrap.ray import START_S, RayBootstrap, namespace
from vllm_efa_ep.bootstrap.run import Run, is_member
from vllm_efa_ep.config import SETTINGS
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, MembershipError

_SETTING_PREFIXES = ("EFA_EP_", "FI_")
_OF_ONE_HOST = frozenset(setting.variable for setting in SETTINGS if setting.of_one_host)
_INVENTORY_SECONDS = 60.0
_KEEP_RESULT_S = 3600.0
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


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect this process to the cluster of RAY_ADDRESS, or of this host, for the time of a ``with``.

    Raises:
        ConfigurationError: There is no such cluster.

    """
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigurationError(
            f"there is no Ray cluster here ({error}); run `ray start --head` on one node, `ray start "
            "--address=THAT_NODE:6379` on the others, or set RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
    compare_hosts: bool = True,
) -> list[_Result]:
    """Run ``function(bootstrap, *arguments)`` as ``world_size`` ranks on the cluster; return their results.

    Ranks are processes; consecutive ranks share a host, and hosts get as equal numbers as possible.

    Args:
        world_size: Number of ranks.
        function: What each rank does; gets its ``RayBootstrap`` first.
        arguments: What it gets besides.
        gpus_per_rank: GPUs that Ray reserves for each rank.
        start_timeout_s: How long ranks wait for each other before they begin.
        timeout_s: How long all ranks together may take once they have begun; None: the function has deadlines
            of its own.
        environment: Variables of the ranks, besides this process's settings of ours and of libfabric. Those
            that name something of one host count where Ray was started without them.
        compare_hosts: Refuse to run on hosts whose versions or settings differ.

    Raises:
        ConfigurationError: The cluster has too few GPUs.
        EfaEpError: A rank failed or did not end in time; the message names it, and the others have been
            ended.

    """
    ranks = RayRanks.start(
        *(Run.new(), world_size, function, arguments),
        gpus_per_rank=gpus_per_rank,
        start_timeout_s=start_timeout_s,
        environment=environment,
        compare_hosts=compare_hosts,
    )
    try:
        return ranks.results(timeout_s)
    finally:
        ranks.end()


class RayRanks:
    """The ranks of a run, as actors that outlive the driver that started them.

    A driver that keeps the ``Run`` somewhere safe can be restarted: ``attach`` finds the ranks at work.
    """

    def __init__(self, run: Run, actors: Sequence[Any]) -> None:
        """Take over one actor per rank; use ``start`` or ``attach``."""
        self.run = run
        self._actors = actors

    @classmethod
    def start(
        cls,
        run: Run,
        world_size: int,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
        *,
        gpus_per_rank: int = 0,
        start_timeout_s: float = START_S,
        environment: Mapping[str, str] | None = None,
        compare_hosts: bool = True,
    ) -> "RayRanks":
        """Start the ranks of a run; the arguments are those of ``run_on_ray``.

        Raises:
            ConfigurationError: The cluster has too few GPUs.
            EfaEpError: Ray did not start them in time; they have been ended.

        """
        settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTING_PREFIXES)}
        of_hosts = {name: settings.pop(name) for name in _OF_ONE_HOST & settings.keys()}
        actors: list[Any] = [
            ray.remote(_Rank)
            .options(
                name=_name(rank),
                namespace=namespace(run),
                lifetime="detached",
                max_concurrency=2,
                num_cpus=0,
                num_gpus=gpus_per_rank,
                scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False),
                runtime_env={"env_vars": {**settings, **(environment or {})}},
            )
            .remote(digest_of(run.token), of_hosts)
            for rank, host in enumerate(_places(world_size, gpus_per_rank))
        ]
        ranks = cls(run, actors)
        try:
            # Waited for: a call on its way to an actor dies with the driver.
            begun = {
                actor.begin.remote(
                    run, rank, world_size, start_timeout_s, compare_hosts, function, tuple(arguments)
                ): rank
                for rank, actor in enumerate(actors)
            }
            done, late = ray.wait(list(begun), num_returns=len(begun), timeout=start_timeout_s)
            if late:
                unplaced = sorted(begun[answer] for answer in late)
                raise EfaEpError(
                    f"Ray did not start ranks {unplaced} within {start_timeout_s:g} s; see `ray status`"
                )
            for answer in done:
                _result(f"the start of rank {begun[answer]}", answer)
        except BaseException:  # Ctrl-C, too: actors outlive their driver, and nobody else knows of these
            ranks.end()
            raise
        return ranks

    @classmethod
    def attach(cls, run: Run, world_size: int) -> "RayRanks":
        """Return the ranks that another driver has started.

        Raises:
            ConfigurationError: There are none, or they have ended.

        """
        try:
            actors = [ray.get_actor(_name(rank), namespace(run)) for rank in range(world_size)]
        except ValueError as error:
            raise ConfigurationError(f"run {run.name} has no {world_size} ranks on this cluster") from error
        return cls(run, actors)

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """Wait for all ranks and return their results; the first failure ends the wait.

        Args:
            timeout_s: How long to wait for all of them together; None: until they end.

        Raises:
            EfaEpError: A rank failed or did not end in time; the message names it.

        """
        answers = {actor.result.remote(self.run.token): rank for rank, actor in enumerate(self._actors)}
        results: dict[int, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting := [answer for answer, rank in answers.items() if rank not in results]:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, late = ray.wait(waiting, timeout=left_s)
            if not done:
                unfinished = sorted(answers[answer] for answer in late)
                raise EfaEpError(f"ranks {unfinished} did not end within {timeout_s:g} s")
            for answer in done:
                results[answers[answer]] = _result(f"rank {answers[answer]}", answer)
        return [results[rank] for rank in range(len(self._actors))]

    def end(self) -> None:
        """End the ranks, whatever they do."""
        for actor in self._actors:
            ray.kill(actor)


class _Rank:
    """One rank's process: works in a thread, and hands the result to members of the run."""

    def __init__(self, token_digest: bytes, settings_of_hosts: Mapping[str, str]) -> None:
        for name, value in settings_of_hosts.items():
            os.environ.setdefault(name, value)
        self._token_digest = token_digest
        self._outcome: Future[Any] = Future()

    def begin(self, *work: Any) -> None:
        Thread(target=self._work, args=work, name="efa_ep_rank", daemon=True).start()

    def _work(
        self,
        run: Run,
        rank: int,
        world_size: int,
        timeout_s: float,
        compare_hosts: bool,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
    ) -> None:
        try:
            bootstrap = RayBootstrap(run, rank, world_size, timeout_s)
            if compare_hosts:
                bootstrap.compare_hosts()
            result = function(bootstrap, *arguments)
            bootstrap.close()
        except Exception as error:  # handed to the driver, whatever it is
            self._outcome.set_exception(error)
        except BaseException as error:  # sys.exit(), which Ray would take for the end of this process
            self._outcome.set_exception(EfaEpError(f"it was ended by {type(error).__name__}: {error}"))
        else:
            self._outcome.set_result(result)
        # The driver that takes the result ends this process; without one, nobody else would.
        time.sleep(_KEEP_RESULT_S)
        os._exit(0)

    def result(self, token: bytes) -> Any:
        if not is_member(digest_of(token), self._token_digest):
            raise MembershipError("the result of a rank is for members of its run; pass the run's token")
        return self._outcome.result()


def _name(rank: int) -> str:
    return f"rank {rank}"


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
