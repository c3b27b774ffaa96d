"""Bootstrap over Ray: a coordinator actor in a namespace of the run, whichever driver started the ranks.

The actor is detached: it outlives the driver that created it, and ends by itself when the last rank has left
or is gone. It runs on Ray's head node, without which there is no Ray. What it holds is open to members of the
run only, but Ray itself lets everybody who reaches it run code: switch Ray's own token authentication on
(``RAY_AUTH_MODE=token``) where strangers reach the cluster.
"""

import json
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from vllm_efa_ep.bootstrap.coordinator import LEASE_S, Coordinator, Ticket, digest_of
from vllm_efa_ep.bootstrap.inventory import Inventory, take_inventory
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.config import SETTINGS, Settings
from vllm_efa_ep.errors import ConfigurationError, EfaEpError

logger = logging.getLogger(__name__)

START_S = 600.0
"""How long ranks wait for each other at the start, in seconds: some load a model before, some elsewhere."""

_ANSWER_SECONDS = 5.0
_ACTOR_SECONDS = 60.0
_RENEWALS_PER_LEASE = 6
_HEAD = {"node:__internal_head__": 0.001}
# Settings that name something of one host.
_OF_ONE_HOST = ("libfabric", "interface", "stats_dir")


class RayBootstrap:
    """One rank of a run."""

    def __init__(
        self,
        run: Run,
        rank: int,
        world_size: int,
        timeout_s: float = START_S,
        lease_s: float = LEASE_S,
    ) -> None:
        """Join the run, or, with the rank of a process that is gone, take its place.

        Args:
            run: The same on all ranks.
            rank: This rank.
            world_size: Number of ranks.
            timeout_s: Longest wait for the other ranks in ``all_gather``.
            lease_s: After how many seconds without a sign of life other ranks take this one for gone.

        Raises:
            ConfigurationError: This process is not connected to Ray, or another one is this rank.
            MembershipError: The run has another token.
            EfaEpError: Ray does not answer.

        """
        if not ray.is_initialized():
            raise ConfigurationError(
                "this process is not connected to Ray; call ray.init(address=...) before"
            )
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._gatherings = 0
        self._address = _own_address()
        name = f"process {os.getpid()} on {socket.gethostname()} ({self._address})"
        self._ticket = Ticket(run.token, rank, secrets.token_hex(8), name)
        self._coordinator = _coordinator(run, world_size, lease_s)
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        threading.Thread(
            target=_renew,
            args=(self._coordinator, self._ticket, lease_s / _RENEWALS_PER_LEASE, self._stop),
            name="efa_ep_lease",
            daemon=True,
        ).start()

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def address(self) -> str:
        """The address under which Ray knows this host."""
        return self._address

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over the coordinator.

        Raises:
            RankLostError: A rank ended while the others waited for it.
            RankTimeoutError: Ranks did not come within ``timeout_s``.

        """
        number, self._gatherings = self._gatherings, self._gatherings + 1
        wait_s = self._timeout_s
        answer = self._coordinator.gather.remote(self._ticket, number, payload, wait_s)
        gathered: list[bytes] = _ask(answer, wait_s + _ANSWER_SECONDS)
        return gathered

    def publish(self, key: str, value: str) -> None:
        """Keep a value at the coordinator."""
        _ask(self._coordinator.publish.remote(self._ticket, key, value))

    def publish_once(self, key: str, value: str) -> str:
        """Keep a value unless another rank was first; return the one that is kept."""
        winner: str = _ask(self._coordinator.publish_once.remote(self._ticket, key, value))
        return winner

    def lookup(self, key: str) -> str | None:
        """Ask the coordinator for a value."""
        value: str | None = _ask(self._coordinator.lookup.remote(self._ticket, key))
        return value

    def close(self) -> None:
        """Leave the run; the last rank's leaving ends the coordinator. Safe to repeat."""
        if not self._stop.is_set():
            self._stop.set()
            _ask(self._coordinator.leave.remote(self._ticket))

    def compare_hosts(self, settings: Settings | None = None) -> tuple[Inventory, ...]:
        """Collective: check that all ranks have the same versions and settings.

        Args:
            settings: Default: those of the environment.

        Returns:
            What the host of each rank has.

        Raises:
            ConfigurationError: Ranks disagree; the message names two of them and both values.
            EfaEpError: As in ``all_gather``.

        """
        inventory = take_inventory()
        claim = {
            "host": self._address,
            "inventory": asdict(inventory),
            "settings": _common(settings or Settings.from_environment()),
        }
        claims = [json.loads(each) for each in self.all_gather(json.dumps(claim).encode())]
        check_same(
            [each["host"] for each in claims],
            [each["inventory"]["versions"] | each["settings"] for each in claims],
        )
        inventories = tuple(
            Inventory(
                **each["inventory"]
                | {name: tuple(each["inventory"][name]) for name in ("gpus", "efa_generations")}
            )
            for each in claims
        )
        kinds = {str(each) for each in inventories}
        if self._rank == 0 and len(kinds) > 1:
            logger.warning("EFA EP: the hosts differ: %s", "; ".join(sorted(kinds)))
        return inventories


def check_same(hosts: list[str], values: list[Mapping[str, Any]]) -> None:
    """Raise ``ConfigurationError`` for the first name whose value differs between rank 0 and another rank."""
    for rank, found in enumerate(values):
        for name in sorted(values[0].keys() | found.keys()):
            if values[0].get(name) != found.get(name):
                raise ConfigurationError(
                    f"ranks disagree about {name}: rank 0 on {hosts[0]} has {values[0].get(name)!r}, rank "
                    f"{rank} on {hosts[rank]} has {found.get(name)!r}; make it the same on all hosts"
                )


def _common(settings: Settings) -> dict[str, Any]:
    fields = {setting.variable: setting.field for setting in SETTINGS if setting.field not in _OF_ONE_HOST}
    return {variable: getattr(settings, field) for variable, field in fields.items()}


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class _CoordinatorActor(Coordinator):
    """The coordinator as an actor, which can end itself."""

    def __init__(self, name: str, size: int, token_digest: bytes, lease_s: float) -> None:
        itself = ray.get_runtime_context().current_actor
        super().__init__(name, size, token_digest, lambda: ray.kill(itself), lease_s)

    async def ready(self) -> None:
        """Answer once the actor has started."""


def namespace(run: Run) -> str:
    """Return Ray's namespace for the actors of a run."""
    return f"vllm_efa_ep/{run.name}"


def _coordinator(run: Run, world_size: int, lease_s: float) -> Any:
    """Return the run's coordinator; whoever comes first creates it."""
    handle: Any = (
        ray.remote(_CoordinatorActor)
        .options(
            name="coordinator",
            namespace=namespace(run),
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=_HEAD,
            # Not in the placement group of the caller, which has no room for it.
            scheduling_strategy="DEFAULT",
            # Every rank waits in a gathering, looks something up, and renews its lease.
            max_concurrency=3 * world_size,
        )
        .remote(run.name, world_size, digest_of(run.token), lease_s)
    )
    _ask(handle.ready.remote(), _ACTOR_SECONDS)
    return handle


def _ask(answer: "ray.ObjectRef[Any]", timeout_s: float = _ANSWER_SECONDS) -> Any:
    try:
        return ray.get(answer, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, EfaEpError):
            raise error.cause from None
        raise EfaEpError(f"the coordinator failed: {error}") from error
    except GetTimeoutError as error:
        raise EfaEpError(
            f"Ray did not answer within {timeout_s:g} s; look at `ray status` and at the network between "
            "this host and Ray's head node"
        ) from error
    except RayActorError as error:
        raise EfaEpError(f"the coordinator of this run is gone: {error}") from error
    except RayError as error:
        raise EfaEpError(f"Ray failed: {error}") from error


def _renew(coordinator: Any, ticket: Ticket, period_s: float, stop: threading.Event) -> None:
    # Nobody waits for the answers: a coordinator that is gone shows at the next request.
    while not stop.wait(period_s) and ray.is_initialized():
        coordinator.renew.remote(ticket)
