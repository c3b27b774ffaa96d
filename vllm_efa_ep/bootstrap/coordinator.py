"""The place where the ranks of one run meet when no process group does it: state, and who may touch it.

Knows nothing of Ray: ``bootstrap.ray`` runs it as an actor. All methods run in one event loop, so nothing
here needs a lock.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_efa_ep.bootstrap.run import is_member
from vllm_efa_ep.errors import ConfigurationError, MembershipError, RankLostError, RankTimeoutError

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""A member that has not been heard of for so long, in seconds, is gone."""

_FAREWELL_S = 1.0


@dataclass(frozen=True)
class Ticket:
    """What a member shows at every call.

    Attributes:
        token: The run's.
        rank: The member's rank.
        member: Tells processes apart that claim the same rank.
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
    heard_at: float
    left: bool = False


class Coordinator:
    """Gathers payloads of all ranks, keeps published values, and ends when no member is left."""

    def __init__(
        self,
        name: str,
        size: int,
        token_digest: bytes,
        end: Callable[[], None],
        lease_s: float = LEASE_S,
    ) -> None:
        """Serve a run.

        Args:
            name: The run's name.
            size: Number of ranks.
            token_digest: ``digest_of`` the run's token; the token itself is kept nowhere.
            end: Called when all members have left or are gone.
            lease_s: After how many seconds of silence a member is gone.

        """
        self._name = name
        self._size = size
        self._token_digest = token_digest
        self._end = end
        self._lease_s = lease_s
        self._members: dict[int, _Member] = {}
        self._gatherings: dict[int, _Gathering] = {}
        self._published: dict[str, str] = {}
        self._supervision: asyncio.Task[None] | None = None

    async def gather(self, ticket: Ticket, number: int, payload: bytes, timeout_s: float) -> list[bytes]:
        """Bring a payload to the gathering with this number and return every rank's, in rank order.

        Raises:
            MembershipError: The caller is a stranger.
            ConfigurationError: Another process is this rank.
            RankLostError: A rank that should have come has left, or is gone.
            RankTimeoutError: Ranks did not come within ``timeout_s`` seconds.

        """
        await self._admit(ticket)
        gathering = self._gatherings.setdefault(number, _Gathering())
        gathering.payloads[ticket.rank] = payload
        if len(gathering.payloads) == self._size:
            gathering.over.set()
            del self._gatherings[number]
        self._end_hopeless_gatherings()
        try:
            await asyncio.wait_for(gathering.over.wait(), timeout_s)
        except asyncio.TimeoutError:
            missing = tuple(sorted(set(range(self._size)) - gathering.payloads.keys()))
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

    async def renew(self, ticket: Ticket) -> None:
        """Say that the member lives, as every other call does, too."""
        await self._admit(ticket)

    async def leave(self, ticket: Ticket) -> None:
        """Say that the member needs the coordinator no more."""
        await self._admit(ticket)
        self._members[ticket.rank].left = True
        self._end_hopeless_gatherings()
        # After the answer, which would not arrive otherwise.
        asyncio.get_running_loop().call_later(_FAREWELL_S, self._end_if_nobody_is_left)

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
        await self._succeed(ticket)
        self._members[ticket.rank].heard_at = time.monotonic()
        if self._supervision is None:
            self._supervision = asyncio.get_running_loop().create_task(self._supervise())

    async def _succeed(self, ticket: Ticket) -> None:
        """Make the caller its rank's member. A process that was it before must be gone: wait for a sign."""
        while (known := self._members.get(ticket.rank)) is not None:
            if known.ticket.member == ticket.member:
                return
            if self._is_gone(known, time.monotonic()):
                break
            heard_at = known.heard_at
            await asyncio.sleep(self._lease_s / 4)
            if known.heard_at != heard_at:
                raise ConfigurationError(
                    f"{known.ticket.name} and {ticket.name} both claim rank {ticket.rank} of run "
                    f"{self._name}; give every process its own rank"
                )
        self._members[ticket.rank] = _Member(ticket, time.monotonic())

    def _is_gone(self, member: _Member, now: float) -> bool:
        return member.left or now - member.heard_at > self._lease_s

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            self._end_hopeless_gatherings()
            self._end_if_nobody_is_left()

    def _end_hopeless_gatherings(self) -> None:
        now = time.monotonic()
        gone = {rank for rank, member in self._members.items() if self._is_gone(member, now)}
        for number, gathering in list(self._gatherings.items()):
            if lost := gone - gathering.payloads.keys():
                gathering.lost = min(lost)
                gathering.over.set()
                del self._gatherings[number]

    def _end_if_nobody_is_left(self) -> None:
        now = time.monotonic()
        if all(self._is_gone(member, now) for member in self._members.values()):
            logger.info("EFA EP: run %s has no member left and ends", self._name)
            self._end()


def digest_of(token: bytes) -> bytes:
    """Return what the coordinator keeps of a token."""
    return hashlib.sha256(token).digest()
