"""What an ``AllToAll`` has done so far."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Totals of one rank since its start, all channels together. Times are in seconds if not named otherwise.

    Attributes:
        rank: This rank.
        world_size: Ranks of the run.
        nodes: Groups of ranks that share memory; only rows between nodes use the network.
        provider: libfabric provider in use, empty if there is one node.
        fabric: Name of the provider's fabric, for example ``efa-direct``.
        library: Path and version of libfabric.
        nics: The NICs this rank drives.
        huge_pages: Whether the arena lies in 2 MiB pages.
        rounds: Dispatch + combine rounds started.
        tokens: Tokens this rank dispatched.
        received_rows: Rows received for this rank's experts.
        network_rows: Rows this rank put on the network, dispatch and combine together.
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
    rounds: int
    tokens: int
    received_rows: int
    network_rows: int
    peer_rows: int
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
        longest = max(self.waited_for_seconds)
        return self.waited_for_seconds.index(longest) if longest > 0 else None
