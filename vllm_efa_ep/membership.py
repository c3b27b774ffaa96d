"""Which ranks are alive: the agreement of the survivors, and the way back for a rank that was left out.

All of it goes over the keys of the bootstrap, since nothing else is sure to work after a loss. A *generation*
is one agreed set of ranks; the start is generation 0. To agree on generation g, every rank that wants to be
in it publishes ``here/g/<rank>``; one of them, when all are there that can be expected or the window is over,
proposes those it sees with ``publish_once("mask/g")``; what stands there holds for all. So there is exactly
one mask per generation, whoever dies or comes late in between, and whoever is not in it knows.

An *incarnation* numbers the processes that have been a rank, and each return of a process that was left out.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import RankExcludedError, RankTimeoutError
from vllm_efa_ep.messages import integer, number, read_json

_POLL_SECONDS = 0.005
_MOST = 2**31  # generations and incarnations


@dataclass(frozen=True)
class Membership:
    """One generation.

    Attributes:
        generation: Its number.
        ranks_per_node: Of the world; constant.
        members: The live ranks, ascending.
        incarnations: The newest incarnation of every rank that has been seen, members or not.

    """

    generation: int
    ranks_per_node: int
    members: tuple[int, ...]
    incarnations: tuple[int, ...]

    @classmethod
    def first(cls, world_size: int, ranks_per_node: int) -> "Membership":
        """Return generation 0: everybody, for the first time."""
        return cls(0, ranks_per_node, tuple(range(world_size)), (0,) * world_size)

    @classmethod
    def decode(cls, text: str, generation: int, world_size: int) -> "Membership":
        """Read what ``encode`` wrote.

        Args:
            text: What was written.
            generation: Which generation it must be.
            world_size: Of how many ranks.

        Raises:
            ConfigurationError: It is something else.

        """
        return read_json(text, "the store", lambda said: cls._of(said, generation, world_size))

    @classmethod
    def _of(cls, said: Any, generation: int, size: int) -> "Membership":
        incarnations = tuple(integer(each, _MOST) for each in said["incarnations"])
        members = tuple(integer(rank, size) for rank in said["members"])
        per_node = integer(said["ranks_per_node"], size + 1)
        if len(incarnations) != size or per_node < 1 or size % per_node:
            raise ValueError(f"{len(incarnations)} ranks in nodes of {per_node} are no world of {size}")
        if list(members) != sorted({*members}):
            raise ValueError(f"members {members!r:.40} do not ascend")
        if integer(said["generation"], _MOST) != generation:
            raise ValueError(f"it is not of generation {generation}")
        return cls(generation, per_node, members, incarnations)

    def encode(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    def has(self, rank: int, incarnation: int) -> bool:
        """Whether this incarnation of a rank is a member."""
        return rank in self.members and self.incarnations[rank] == incarnation


class Agreement:
    """One rank's part in agreeing on generations."""

    def __init__(self, bootstrap: Bootstrap, window_s: float) -> None:
        """Wait at most ``window_s`` for ranks that are not known to be gone."""
        self._bootstrap = bootstrap
        self._rank = bootstrap.rank
        self._window_s = window_s

    def next(
        self,
        current: Membership,
        gone: Callable[[], frozenset[int]],
        returning: Mapping[int, int],
    ) -> Membership:
        """Agree on the generation after ``current``, of which this rank is a member.

        Args:
            current: The generation to leave.
            gone: The members whose end is known; asked again and again.
            returning: Incarnations of ranks that wait to be let in.

        Raises:
            RankExcludedError: The others agreed without this rank.

        """
        generation = current.generation + 1
        incarnation = current.incarnations[self._rank]
        self._bootstrap.publish(_here(generation, self._rank), str(incarnation))
        deadline = time.monotonic() + self._window_s
        while (text := self._bootstrap.lookup(_mask(generation))) is None:
            living = {*current.members} - gone() | {self._rank}
            over = time.monotonic() > deadline
            # One rank looks whether all are here: the store need not answer everybody about everybody.
            if over or self._rank == min(living):
                here = self._here(generation)
                if over or living | returning.keys() <= here.keys():
                    proposed = _membership(current, here, returning)
                    text = self._bootstrap.publish_once(_mask(generation), proposed.encode())
                    break
            time.sleep(_POLL_SECONDS)
        agreed = Membership.decode(text, generation, self._bootstrap.world_size)
        if not agreed.has(self._rank, incarnation):
            raise RankExcludedError(
                f"the other ranks have gone on without rank {self._rank}: generation {generation} is ranks "
                f"{', '.join(map(str, agreed.members))}; call rejoin() to come back, or end this process",
                generation,
            )
        return agreed

    def waiting(self, current: Membership, call: int) -> dict[int, int]:
        """Return the incarnations of the ranks that wait to be let in; equal on all members.

        Args:
            current: The generation.
            call: Counts the questions in this generation; equal on all members.

        """
        key = f"waiting/{current.generation}/{call}"
        text = self._bootstrap.lookup(key)
        if text is None:
            found = {}
            for rank in {*range(self._bootstrap.world_size)} - {*current.members}:
                text = self._bootstrap.lookup(_returned(rank))
                if text is not None:
                    incarnation = number(text, f"rank {rank}", _MOST)
                    if incarnation > current.incarnations[rank]:
                        found[rank] = incarnation
            text = self._bootstrap.publish_once(key, json.dumps(list(found.items())))
        return read_json(text, "the store", self._waiting)

    def _waiting(self, said: Any) -> dict[int, int]:
        size = self._bootstrap.world_size
        return {integer(rank, size): integer(incarnation, _MOST) for rank, incarnation in said}

    def come_back(self, timeout_s: float) -> Membership:
        """Announce a new incarnation of this rank, and wait until a generation has it.

        Raises:
            RankTimeoutError: The others did not let it in.

        """
        deadline = time.monotonic() + timeout_s
        generation = 1
        incarnation = self._announce()
        while True:
            self._bootstrap.publish(_here(generation, self._rank), str(incarnation))
            while (text := self._bootstrap.lookup(_mask(generation))) is None:
                if time.monotonic() > deadline:
                    raise RankTimeoutError(
                        f"rank {self._rank} waited {timeout_s:g} s to be let in; the other ranks must call "
                        "rejoin() between two rounds, or mask()",
                        "rejoin",
                        0,
                    )
                time.sleep(_POLL_SECONDS)
            agreed = Membership.decode(text, generation, self._bootstrap.world_size)
            if agreed.has(self._rank, incarnation):
                return agreed
            if agreed.incarnations[self._rank] >= incarnation:  # waited for, and given up
                incarnation = self._announce()
            generation += 1

    def _announce(self) -> int:
        incarnation, own = 1, secrets.token_hex(8)
        while self._bootstrap.publish_once(f"incarnation/{self._rank}/{incarnation}", own) != own:
            incarnation += 1
        self._bootstrap.publish(_returned(self._rank), str(incarnation))
        return incarnation

    def _here(self, generation: int) -> dict[int, int]:
        found = {
            rank: self._bootstrap.lookup(_here(generation, rank))
            for rank in range(self._bootstrap.world_size)
        }
        return {rank: number(text, f"rank {rank}", _MOST) for rank, text in found.items() if text is not None}


def _membership(current: Membership, here: Mapping[int, int], returning: Mapping[int, int]) -> Membership:
    incarnations = tuple(
        max(seen, here.get(rank, 0), returning.get(rank, 0)) for rank, seen in enumerate(current.incarnations)
    )
    members = tuple(sorted(rank for rank, incarnation in here.items() if incarnation == incarnations[rank]))
    return Membership(current.generation + 1, current.ranks_per_node, members, incarnations)


def _here(generation: int, rank: int) -> str:
    return f"here/{generation}/{rank}"


def _mask(generation: int) -> str:
    return f"mask/{generation}"


def _returned(rank: int) -> str:
    return f"returned/{rank}"
