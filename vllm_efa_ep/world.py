"""The collective start: ranks agree on a configuration, learn who shares memory with whom, and connect.

Every step ends with an exchange in which a rank may also say why it cannot go on; then all ranks raise, and
nothing has moved.
"""

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import Any, TypeVar

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.messages import integer, read_json

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class World:
    """Where this rank stands.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        ranks_per_node: Ranks of one node; consecutive ranks that can map each other's memory.
        host_of: The host of every rank, named by the first rank that runs on it.
        server_of: The rank whose process serves each rank's position: its own, or that of a stand-in.

    """

    rank: int
    size: int
    ranks_per_node: int
    host_of: tuple[int, ...]
    server_of: tuple[int, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """The live ranks, ascending."""
        return tuple(rank for rank, server in enumerate(self.server_of) if rank == server)

    @property
    def rank_on_host(self) -> int:
        """This rank's place among the ranks of its host, which decides its NICs.

        A stand-in has the place, and the NICs, of the rank it stands in for; on another host, those of the
        rank that serves it.
        """
        at_home = self._ranks_at_home()
        place = self.rank if self.rank in at_home else self.server_of[self.rank]
        return at_home.index(place)

    @property
    def ranks_on_host(self) -> int:
        """How many ranks share the host and its NICs."""
        return len(self._ranks_at_home())

    def _ranks_at_home(self) -> list[int]:
        """Ranks of this host; without those of lost nodes, whose stand-ins are guests here."""
        live_nodes = {member // self.ranks_per_node for member in self.members}
        host = self.host_of[self.rank]
        return [
            rank
            for rank in range(self.size)
            if self.host_of[rank] == host and rank // self.ranks_per_node in live_nodes
        ]

    @property
    def single_host(self) -> bool:
        """Whether all ranks run on one host."""
        return len(set(self.host_of)) == 1

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.size // self.ranks_per_node

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def index(self) -> int:
        """This rank's place in its node."""
        return self.rank % self.ranks_per_node

    @property
    def node_ranks(self) -> range:
        """The ranks of this rank's node."""
        first = self.node * self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    @property
    def rail_peers(self) -> list[int]:
        """The ranks with this rank's index on the other nodes: the only ones it talks to over the network."""
        return [node * self.ranks_per_node + self.index for node in range(self.nodes) if node != self.node]


@dataclass(frozen=True)
class _Claim:
    """What a process says when it joins."""

    rank: int
    host: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, said: Any, size: int) -> "_Claim":
        """Interpret a message in a world of ``size`` ranks."""
        host, settings = said["host"], said["settings"]
        if not isinstance(host, str) or not isinstance(settings, dict):
            raise TypeError("host is a string, settings are named")
        return cls(integer(said["rank"], size), host, settings)


def agree(
    bootstrap: Bootstrap, step: str, contribute: Callable[[], tuple[Kept, bytes]]
) -> tuple[Kept, list[bytes]]:
    """Collective: do a step of the start and gather what each rank has to tell about it.

    Args:
        bootstrap: Connects the ranks.
        step: Names the step in errors.
        contribute: Does the step here; returns what this rank keeps of it and what it tells the others.

    Returns:
        What this rank keeps, and what every rank told.

    Raises:
        Exception: ``contribute`` raised it here.
        ConfigurationError: It raised on another rank; the message names that rank and its reason.

    """
    try:
        kept, message = contribute()
    except Exception as error:  # whatever it is, the others must not wait for this rank
        bootstrap.all_gather(b"-" + f"{type(error).__name__}: {error}".encode())
        raise
    answers = bootstrap.all_gather(b"+" + message)
    refusals = [
        f"rank {rank}: {answer[1:].decode(errors='replace')}"
        for rank, answer in enumerate(answers)
        if answer[:1] != b"+"
    ]
    if refusals:
        raise ConfigurationError(f"{step} failed on other ranks; nothing was started. {'; '.join(refusals)}")
    return kept, [answer[1:] for answer in answers]


def join_world(
    bootstrap: Bootstrap,
    must_agree: Mapping[str, Any],
    ranks_per_node: int,
    server_of: tuple[int, ...] | None = None,
    nodes_span_hosts: bool = False,
) -> World:
    """Collective: check that all ranks want the same, and find out which of them share a host.

    Args:
        bootstrap: Connects the ranks.
        must_agree: Names and values (JSON) that have to be equal on all ranks.
        ranks_per_node: Ranks per node, or 0 to take the greatest common divisor of the hosts' rank counts.
        server_of: As in ``World``; None if every rank is alive.
        nodes_span_hosts: Whether ranks of several hosts can be a node, if ``ranks_per_node`` says so.

    Raises:
        ConfigurationError: Ranks disagree, two claim one id, or ``ranks_per_node`` does not fit the hosts.

    """

    def claim() -> tuple[None, bytes]:
        own_claim = {"rank": bootstrap.rank, "host": host_identity(), "settings": dict(must_agree)}
        return None, json.dumps(own_claim).encode()

    _, told = agree(bootstrap, "joining", claim)
    claims = [
        read_json(each, f"rank {rank}", lambda said: _Claim.of(said, len(told)))
        for rank, each in enumerate(told)
    ]
    _check_claims(claims)
    hosts = [claim.host for claim in claims]
    return World(
        rank=bootstrap.rank,
        size=len(claims),
        ranks_per_node=_ranks_per_node(hosts, ranks_per_node, nodes_span_hosts),
        host_of=tuple(hosts.index(host) for host in hosts),
        server_of=server_of if server_of is not None else tuple(range(len(claims))),
    )


def host_identity() -> str:
    """Name the set of processes that this one can share memory with: one boot of one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def _check_claims(claims: list[_Claim]) -> None:
    by_id: dict[int, int] = {}
    for position, claim in enumerate(claims):
        other = by_id.setdefault(claim.rank, position)
        if other != position:
            raise ConfigurationError(
                f"two processes (numbers {other} and {position} of the bootstrap) claim rank "
                f"{claim.rank}; give every process its own rank"
            )
    first = claims[0].settings
    for rank, claim in enumerate(claims):
        settings = claim.settings
        for name in sorted(first.keys() | settings.keys()):
            if first.get(name) != settings.get(name):
                raise ConfigurationError(
                    f"ranks disagree about {name}: rank 0 has {first.get(name)!r}, rank {rank} has "
                    f"{settings.get(name)!r}; start all ranks with the same value"
                )


def _ranks_per_node(hosts: list[str], wanted: int, nodes_span_hosts: bool) -> int:
    runs = [len(list(run)) for _, run in groupby(hosts)]
    fitting = len(hosts) if nodes_span_hosts and wanted else gcd(*runs)
    if wanted == 0:
        return fitting
    if fitting % wanted != 0:
        raise ConfigurationError(
            f"EFA_EP_RANKS_PER_NODE={wanted} does not divide {fitting}, the greatest common divisor of the "
            f"hosts' rank counts {runs}; use a divisor of it, or leave it unset"
        )
    return wanted
