"""Positions of ranks that are gone: who serves them, so that the world keeps its shape.

A lost rank is missing as a rail peer and as a member of its node, not only as an owner of experts. Instead of
teaching the protocol to do without, a live process takes the position, with no tokens and no experts. Every
layout, offset, rank number and proof stays as it is.
"""

import time
from collections.abc import Sequence

from vllm_efa_ep.connection import Connection
from vllm_efa_ep.errors import RankTimeoutError
from vllm_efa_ep.rank_memory import StandInCore
from vllm_efa_ep.watch import CheckWait
from vllm_efa_ep.world import World

_CHECK_SECONDS = 0.1


def servers(world_size: int, ranks_per_node: int, members: Sequence[int]) -> tuple[int, ...]:
    """Return the live rank whose process serves each rank's position.

    A live rank serves its own. A lost one is served from its node, whose memory it must share, by the live
    ranks there in turn. A node without live ranks moves as a whole to the node that has fewest guests.

    Args:
        world_size: Number of ranks.
        ranks_per_node: Ranks of a node.
        members: The live ranks, ascending; at least one.

    """
    live: list[list[int]] = [[] for _ in range(world_size // ranks_per_node)]
    for member in members:
        live[member // ranks_per_node].append(member)
    # Positions that each live rank of a node serves, on average, decide who takes a whole node.
    served = {node: ranks_per_node for node, ranks in enumerate(live) if ranks}
    server_of = []
    for node, ranks in enumerate(live):
        hosts = ranks
        if not hosts:
            helper = min(served, key=lambda each: (served[each] / len(live[each]), each))
            served[helper] += ranks_per_node
            hosts = live[helper]
        first = node * ranks_per_node
        lost = [rank for rank in range(first, first + ranks_per_node) if rank not in ranks]
        stand_ins = {rank: hosts[turn % len(hosts)] for turn, rank in enumerate(lost)}
        server_of += [stand_ins.get(rank, rank) for rank in range(first, first + ranks_per_node)]
    return tuple(server_of)


class StandIn:
    """A lost rank's position, served by this process."""

    def __init__(self, world: World, connection: Connection, core: StandInCore) -> None:
        """Take over the position's connection and the threads that run its halves."""
        self.rank = world.rank
        self._connection = connection
        self._core = core

    def start_round(self, channel: int) -> None:
        """Run one round more."""
        self._core.start_round(channel)

    def raise_failure(self) -> None:
        """Raise what ended a round, if anything did."""
        self._core.throw_if_failed()

    def finish(self, timeout_s: float, check: CheckWait) -> None:
        """Wait until all rounds are over and all writes complete, or ``check`` raises."""
        deadline = time.monotonic() + timeout_s
        while not self._core.wait_until_idle(_CHECK_SECONDS):
            wait = f"close waited {timeout_s:g} s for the rounds of the stand-in for rank {self.rank}"
            check("close", 0, wait)
            if time.monotonic() > deadline:
                raise RankTimeoutError(wait, "close", 0, (self.rank,))
        self._connection.drain(timeout_s, check)

    def end_waits(self) -> None:
        """End waits of its kernels for ranks that will not answer."""
        self._connection.memory.end_waits()

    def stop(self) -> None:
        """End its threads, and whatever they wait for."""
        self._core.stop()

    def close(self) -> None:
        """Free its memory, after ``stop``."""
        del self._core
        self._connection.close()
