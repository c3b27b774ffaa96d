"""The place where the ranks of one run meet when no process group does it: state, and who may touch it.

Knows nothing of Ray: ``bootstrap.ray`` runs it as an actor. All methods run in one event loop, so nothing
here needs a lock.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_efa_ep.bootstrap.run import is_member
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError, MembershipError, RankLostError, RankTimeoutError

logger = logging.getLogger(__name__)

_PATIENCE_S = 1.0
_REMIND_S = 10.0


@dataclass(frozen=True)
class Ticket:
    """What a member shows at every call.

    Attributes:
        token: The run's.
        rank: The member's rank.
        member: Tells processes apart that claim the same rank; the process is connected under it.
        name: Who it is, for people.

    """

    token: bytes = field(repr=False)
    rank: int
    member: str
    name: str


@dataclass
class _Gathering:
    payloads: dict[int, bytes] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    lost: int | None = None


@dataclass
class _Member:
    ticket: Ticket
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False


class Coordinator:
    """Gathers payloads of all ranks, keeps published values, and ends when no member is connected."""

    def __init__(
        self,
        name: str,
        size: int,
        token_digest: bytes,
        end: Callable[[], None],
        host_timeout_s: float = Settings.host_timeout_s,
    ) -> None:
        """Serve a run.

        Args:
            name: The run's name.
            size: Number of ranks.
            token_digest: ``digest_of`` the run's token; the token itself is kept nowhere.
            end: Called when the last member's connection has ended, or none came in time.
            host_timeout_s: Within how many seconds a member's connection ends if its host does.

        """
        self._name = name
        self._size = size
        self._token_digest = token_digest
        self._end = end
        self._host_timeout_s = host_timeout_s
        self._connections: Counter[str] = Counter()
        self._members: dict[int, _Member] = {}
        self._gatherings: dict[int, _Gathering] = {}
        self._published: dict[str, str] = {}

    def end_unless_reached(self, timeout_s: float) -> None:
        """End if nobody is connected after ``timeout_s``: no departure would."""
        asyncio.get_running_loop().call_later(timeout_s, self._end_if_nobody_is_connected)

    def arrived(self, member: str) -> None:
        """A process that has shown the token is connected."""
        self._connections[member] += 1
        for known in self._known_as(member):
            known.gone.clear()

    def departed(self, member: str) -> None:
        """A connection of that process has ended, and the process with it if it has no other."""
        self._connections -= Counter([member])  # without those that are 0
        if member not in self._connections:
            for known in self._known_as(member):
                known.gone.set()
            self._end_hopeless_gatherings()
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._end_if_nobody_is_connected)

    async def gather(self, ticket: Ticket, number: int, payload: bytes, timeout_s: float) -> list[bytes]:
        """Bring a payload to the gathering with this number and return every rank's, in rank order.

        Raises:
            MembershipError: The caller is a stranger.
            ConfigurationError: Another process is this rank.
            RankLostError: A rank that should have come has left, or is gone.
            RankTimeoutError: Ranks did not come within ``timeout_s`` seconds.

        """
        await self._admit(ticket)
        if number not in self._gatherings:
            self._gatherings[number] = _Gathering()
            self._remind_later(number)
        gathering = self._gatherings[number]
        gathering.payloads[ticket.rank] = payload
        if len(gathering.payloads) == self._size:
            gathering.over.set()
            del self._gatherings[number]
        self._end_hopeless_gatherings()
        try:
            await asyncio.wait_for(gathering.over.wait(), timeout_s)
        except asyncio.TimeoutError:
            missing = self._missing(gathering)
            raise RankTimeoutError(
                f"rank {ticket.rank} waited {timeout_s:g} s at the start of run {self._name} for ranks "
                f"{list(missing)}, which did not come; look at their logs",
                missing=missing,
            ) from None
        if gathering.lost is not None:
            gone = self._members[gathering.lost]
            raise RankLostError(
                f"rank {gathering.lost} ({gone.ticket.name}) {'has left' if gone.left else 'is gone'} while "
                f"the ranks of run {self._name} were starting",
                rank=gathering.lost,
            )
        return [gathering.payloads[rank] for rank in range(self._size)]

    async def join(self, ticket: Ticket) -> None:
        """Become the rank's member, as every call does; waits for the end of one that was it before.

        Raises:
            MembershipError: The caller is a stranger.
            ConfigurationError: Another process is this rank, and lives.

        """
        await self._admit(ticket)

    async def publish(self, ticket: Ticket, key: str, value: str) -> None:
        """Keep a value; replaces an earlier one."""
        await self._admit(ticket)
        self._published[key] = value

    async def publish_once(self, ticket: Ticket, key: str, value: str) -> str:
        """Keep a value unless there is one; return the one that is kept."""
        await self._admit(ticket)
        return self._published.setdefault(key, value)

    async def lookup(self, ticket: Ticket, key: str) -> str | None:
        """Return a kept value, if any."""
        await self._admit(ticket)
        return self._published.get(key)

    async def leave(self, ticket: Ticket) -> None:
        """Say that the member needs the coordinator no more."""
        await self._admit(ticket)
        self._members[ticket.rank].left = True
        self._members[ticket.rank].gone.set()
        self._end_hopeless_gatherings()

    async def _admit(self, ticket: Ticket) -> None:
        # Digests, so that nobody who reads the arguments of Ray's actors learns the token.
        if not is_member(digest_of(ticket.token), self._token_digest):
            logger.warning("EFA EP: run %s refused %s: it is not a member", self._name, ticket.name)
            raise MembershipError(
                f"{ticket.name} is not a member of run {self._name}; members get the run's token from its "
                "first rank or its driver"
            )
        if not 0 <= ticket.rank < self._size:
            raise ConfigurationError(
                f"{ticket.name} claims rank {ticket.rank} of run {self._name}; ranks are 0 to "
                f"{self._size - 1}"
            )
        if ticket.member not in self._connections:
            raise RankLostError(
                f"{ticket.name} has lost its connection to the coordinator of run {self._name} and counts as "
                "gone",
                rank=ticket.rank,
            )
        await self._succeed(ticket)

    async def _succeed(self, ticket: Ticket) -> None:
        """Make the caller its rank's member, if a process that was it before is gone."""
        while (known := self._members.get(ticket.rank)) is not None and not known.gone.is_set():
            if known.ticket.member == ticket.member:
                return
            try:
                await asyncio.wait_for(known.gone.wait(), self._host_timeout_s + _PATIENCE_S)
            except asyncio.TimeoutError:
                raise ConfigurationError(
                    f"{known.ticket.name} and {ticket.name} both claim rank {ticket.rank} of run "
                    f"{self._name}; give every process its own rank"
                ) from None
        self._members[ticket.rank] = _Member(ticket)

    def _known_as(self, member: str) -> list[_Member]:
        return [known for known in self._members.values() if known.ticket.member == member]

    def _end_hopeless_gatherings(self) -> None:
        gone = {rank for rank, member in self._members.items() if member.gone.is_set()}
        for number, gathering in list(self._gatherings.items()):
            if lost := gone - gathering.payloads.keys():
                gathering.lost = min(lost)
                gathering.over.set()
                del self._gatherings[number]

    def _missing(self, gathering: _Gathering) -> tuple[int, ...]:
        return tuple(sorted(set(range(self._size)) - gathering.payloads.keys()))

    def _remind_later(self, number: int) -> None:
        asyncio.get_running_loop().call_later(_REMIND_S, self._remind, number)

    def _remind(self, number: int) -> None:
        """Say for whom the others wait: some ranks load a model for minutes before they come."""
        if number in self._gatherings and self._connections:
            missing = list(self._missing(self._gatherings[number]))
            logger.warning("EFA EP: run %s waits for ranks %s", self._name, missing)
            self._remind_later(number)

    def _end_if_nobody_is_connected(self) -> None:
        if not self._connections:
            logger.info("EFA EP: run %s has no member left and ends", self._name)
            self._end()


def digest_of(token: bytes) -> bytes:
    """Return what the coordinator keeps of a token."""
    return hashlib.sha256(token).digest()
