"""What an ``AllToAll`` has done so far."""

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar


@dataclass(frozen=True)
class Totals:
    """What a rank counts; see ``Stats`` for each name."""

    counters: dict[str, int | float] = field(default_factory=dict)
    half_seconds: dict[str, float] = field(default_factory=dict)
    wait_seconds: dict[str, float] = field(default_factory=dict)
    half_buckets: dict[str, list[int]] = field(default_factory=dict)
    wait_buckets: dict[str, list[int]] = field(default_factory=dict)
    waited_for_seconds: list[float] = field(default_factory=list)

    def __add__(self, other: "Totals") -> "Totals":
        """Add up, name by name."""
        return Totals(
            _sum(self.counters, other.counters),
            _sum(self.half_seconds, other.half_seconds),
            _sum(self.wait_seconds, other.wait_seconds),
            _sum_columns(self.half_buckets, other.half_buckets),
            _sum_columns(self.wait_buckets, other.wait_buckets),
            _column_sum(self.waited_for_seconds, other.waited_for_seconds),
        )


_Number = TypeVar("_Number", int, float, int | float)


def _sum(first: dict[str, _Number], second: dict[str, _Number]) -> dict[str, _Number]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def _sum_columns(first: dict[str, list[int]], second: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: _column_sum(first.get(name, []), second.get(name, [])) for name in {**first, **second}}


def _column_sum(first: list[_Number], second: list[_Number]) -> list[_Number]:
    return [one + other for one, other in zip_longest(first, second, fillvalue=0)]


@dataclass(frozen=True)
class Stats:
    """Totals of one rank since its start, all channels together. Times are in seconds if not named otherwise.

    What a stand-in for a lost rank does is not among them.

    Attributes:
        rank: This rank.
        world_size: Ranks of the run.
        nodes: Groups of ranks that share memory; only rows between nodes use the network.
        provider: libfabric provider in use, empty if there is one node.
        fabric: Name of the provider's fabric, for example ``efa-direct``.
        library: Path and version of libfabric.
        nics: The NICs this rank drives.
        huge_pages: Whether the arena lies in 2 MiB pages.
        generation: How often the ranks have agreed on a new mask.
        live_ranks: Ranks that take part.
        stand_ins: Positions of lost ranks that this one serves.
        rounds: Dispatch + combine rounds started.
        tokens: Tokens this rank dispatched.
        received_rows: Rows received for this rank's experts.
        network_rows: Rows this rank put on the network, dispatch and combine together.
        dropped_slots: Slots of dispatched tokens that named an expert of a lost rank.
        dropped_weight: The sum of their router weights; divided by ``tokens``, what an average token lost.
        peer_rows: Rows this rank wrote into the memory of ranks of its own node (itself included).
        writes: RDMA writes posted.
        bytes_written: Payload bytes of those writes.
        completions: Writes completed.
        immediates: Writes of peers that arrived here.
        retries: Posts the fabric refused for the moment.
        fences: Times the signal policy imposed an order between bytes and signals; 0 if ``counted``.
        fence_waits: Fences that found writes not delivered yet.
        signal_requests: Writes that carried a signal and no bytes, beyond ``writes``.
        stall_ns: Nanoseconds in which a fence kept the proxy from posting anything.
        half_seconds: Time inside each half.
        wait_seconds: Part of it spent waiting for other ranks.
        half_buckets: Complete rounds by the time they spent in each half: samples up to each bound of
            ``duration_bounds()``, and last those beyond.
        wait_buckets: The same of the waiting alone.
        waited_for_seconds: By rank, the time of waits for which it was the last one missing.

    """

    rank: int
    world_size: int
    nodes: int
    provider: str
    fabric: str
    library: str
    nics: tuple[str, ...]
    huge_pages: bool
    generation: int
    live_ranks: int
    stand_ins: int
    rounds: int
    tokens: int
    received_rows: int
    network_rows: int
    peer_rows: int
    dropped_slots: int
    dropped_weight: float
    writes: int
    bytes_written: int
    completions: int
    immediates: int
    retries: int
    fences: int
    fence_waits: int
    signal_requests: int
    stall_ns: int
    half_seconds: dict[str, float]
    wait_seconds: dict[str, float]
    half_buckets: dict[str, list[int]]
    wait_buckets: dict[str, list[int]]
    waited_for_seconds: list[float]

    @property
    def slowest_peer(self) -> int | None:
        """The rank that this one has waited for longest, or None if it never waited."""
        longest = max(self.waited_for_seconds, default=0)
        return self.waited_for_seconds.index(longest) if longest > 0 else None
