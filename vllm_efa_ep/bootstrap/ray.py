"""Bootstrap over Ray: a coordinator actor in a namespace of the run, whichever driver started the ranks.

The actor is detached: it outlives the driver that created it, and ends by itself when the last rank has left
or is gone, which the connections that ranks hold to it tell at once, or when none has come within
``START_S``. It runs on Ray's head node, without which there is no Ray. What it holds is open to members of
the run only, but Ray itself lets everybody who reaches it run code: switch Ray's own token authentication on
(``RAY_AUTH_MODE=token``) where strangers reach the cluster.
"""

import json
import logging
import os
import secrets
import socket
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from vllm_efa_ep.bootstrap.coordinator import Coordinator, Ticket, digest_of
from vllm_efa_ep.bootstrap.inventory import Inventory, take_inventory
from vllm_efa_ep.bootstrap.member import Member
from vllm_efa_ep.bootstrap.presence import MEMBER_BYTES, Door, Presence
from vllm_efa_ep.bootstrap.run import Run, is_member
from vllm_efa_ep.config import SETTINGS, Settings
from vllm_efa_ep.errors import ConfigurationError, EfaEpError

logger = logging.getLogger(__name__)

START_S = 600.0
"""How long ranks wait for each other at the start, in seconds: some load a model before, some elsewhere."""

_ANSWER_SECONDS = 5.0
_ACTOR_SECONDS = 60.0
_HEAD = {"node:__internal_head__": 0.001}


class RayBootstrap(Member):
    """One rank of a run."""

    def __init__(
        self,
        run: Run,
        rank: int,
        world_size: int,
        timeout_s: float = START_S,
        host_timeout_s: int = Settings.host_timeout_s,
    ) -> None:
        """Join the run, or, with the rank of a process that is gone, take its place.

        Args:
            run: The same on all ranks.
            rank: This rank.
            world_size: Number of ranks.
            timeout_s: Longest wait for the other ranks in ``all_gather``.
            host_timeout_s: After how many seconds without a sign of life a rank's host counts as gone.

        Raises:
            ConfigurationError: This process is not connected to Ray or cannot reach the coordinator, or
                another one is this rank.
            MembershipError: The run has another token.
            EfaEpError: Ray does not answer.

        """
        if not ray.is_initialized():
            raise ConfigurationError(
                "this process is not connected to Ray; call ray.init(address=...) before"
            )
        super().__init__(run, rank, world_size)
        self._timeout_s = timeout_s
        self._gatherings = 0
        self._address = _own_address()
        name = f"process {os.getpid()} on {socket.gethostname()} ({self._address})"
        self._ticket = Ticket(run.token, rank, secrets.token_hex(MEMBER_BYTES), name)
        self._coordinator = _coordinator(run, world_size, host_timeout_s)
        address, port = _ask(self._coordinator.door.remote(), _ACTOR_SECONDS)
        self._presence = Presence(address, port, run.token, self._ticket.member, _ANSWER_SECONDS)
        weakref.finalize(self, self._presence.close)
        try:
            _ask(self._coordinator.join.remote(self._ticket), host_timeout_s + _ANSWER_SECONDS)
        except EfaEpError:
            self._presence.close()
            raise

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
        self._presence.ensure()
        answer = self._coordinator.gather.remote(self._ticket, number, payload, wait_s)
        gathered: list[bytes] = _ask(answer, wait_s + _ANSWER_SECONDS)
        return gathered

    def close(self) -> None:
        """Leave the run; the last rank's leaving ends the coordinator. Safe to repeat."""
        if not self._presence.closed:
            try:
                self.request("leave")
            finally:
                self._presence.close()

    def request(self, name: str, *arguments: str) -> Any:
        """Ask the coordinator."""
        self._presence.ensure()
        return _ask(getattr(self._coordinator, name).remote(self._ticket, *arguments))

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
        if self.rank == 0 and len(kinds) > 1:
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
    fields = {setting.variable: setting.field for setting in SETTINGS if not setting.of_one_host}
    return {variable: getattr(settings, field) for variable, field in fields.items()}


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class _CoordinatorActor(Coordinator):
    """The coordinator as an actor, which can end itself."""

    def __init__(self, name: str, size: int, token_digest: bytes, host_timeout_s: int) -> None:
        itself = ray.get_runtime_context().current_actor
        super().__init__(name, size, token_digest, lambda: ray.kill(itself), host_timeout_s)
        self._door = Door(
            lambda token: is_member(digest_of(token), token_digest),
            self.arrived,
            self.departed,
            host_timeout_s,
        )

    async def door(self) -> tuple[str, int]:
        """Return address and port at which members connect; ends if none has within ``START_S``."""
        self.end_unless_reached(START_S)
        address = _own_address()
        return address, await self._door.open(address)


def namespace(run: Run) -> str:
    """Return Ray's namespace for the actors of a run."""
    return f"vllm_efa_ep/{run.name}"


def _coordinator(run: Run, world_size: int, host_timeout_s: int) -> Any:
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
            # Every rank waits in a gathering, looks something up, and a process that succeeds it joins.
            max_concurrency=3 * world_size,
        )
        .remote(run.name, world_size, digest_of(run.token), host_timeout_s)
    )
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
