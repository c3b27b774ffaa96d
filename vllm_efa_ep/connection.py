"""What connects one rank to its world: its arena and its node's, its fabric with a proxy, and its watch."""

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass

from vllm_efa_ep import _core
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.descriptors import DescriptorExchange
from vllm_efa_ep.config import Settings
from vllm_efa_ep.rank_memory import Arena, RankMemory
from vllm_efa_ep.trace.clock import least_delays_ns
from vllm_efa_ep.trace.files import create_directory
from vllm_efa_ep.watch import CheckWait, Watch, start_watch
from vllm_efa_ep.world import World, agree

_COUNTERS = (
    "writes",
    "bytes_written",
    "completions",
    "immediates",
    "retries",
    "fences",
    "fence_waits",
    "signal_requests",
    "stall_ns",
)


@dataclass(frozen=True)
class FabricDescription:
    """The network in use; all empty if the world is one node."""

    provider: str = ""
    fabric: str = ""
    library: str = ""
    nics: tuple[str, ...] = ()


class Connection:
    """Owns the memory and the network of one rank. The order of release matters, hence one owner."""

    def __init__(
        self,
        memory: RankMemory,
        arenas: list[Arena],
        index: int,
        fabric: _core.SignalPolicy | None,
        proxy: _core.Proxy | None,
        watch: Watch,
        least_delays_ns: list[int],
    ) -> None:
        """Take over connected parts; ``arenas`` has one entry per rank of the node, ``index`` is the own."""
        self.watch = watch
        self.least_delays_ns = least_delays_ns
        self.memory = memory
        self.arenas = arenas
        self._index = index
        self._fabric = fabric
        self.proxy = proxy

    @property
    def arena(self) -> Arena:
        """The own arena."""
        return self.arenas[self._index]

    @property
    def description(self) -> FabricDescription:
        """What the fabric turned out to be."""
        if self._fabric is None:
            return FabricDescription()
        found = self._fabric.description()
        return FabricDescription(found["provider"], found["fabric"], found["library"], tuple(found["nics"]))

    def counters(self) -> dict[str, int]:
        """Return the totals of the proxy and of its signal policy."""
        if self.proxy is None or self._fabric is None:
            return dict.fromkeys(_COUNTERS, 0)
        return self.proxy.counters() | self._fabric.counters()

    def drain(self, timeout_s: float, check: CheckWait) -> None:
        """Wait until all own writes are complete, or ``check`` raises."""
        self.memory.wait()
        if self.proxy is not None:
            self.proxy.drain(timeout_s, check)

    def close(self) -> None:
        """Stop watching, then the device, the proxy, and the fabric, then unmap."""
        self.watch.close()
        self.memory.stop()
        self.memory.wait()
        self.proxy = None
        self._fabric = None
        self.arenas = []
        self.memory.close()


def connect(
    world: World,
    layout: _core.Layout,
    bootstrap: Bootstrap,
    settings: Settings,
    timeout_s: float,
    memory: RankMemory,
) -> Connection:
    """Collective: allocate this rank's arena, map its node's, connect its rail, and watch the other ranks.

    With ``EFA_EP_TRACE`` it also creates that directory and compares clocks.

    Raises:
        ConfigurationError: Any rank could not.
        FabricUnavailableError: This rank has no usable network.

    """
    if settings.trace:
        agree(bootstrap, "preparing the trace", lambda: (create_directory(settings.trace), b""))
    arenas = _share_memory(world, layout, bootstrap, timeout_s, memory)
    fabric, proxy = None, None
    if world.nodes > 1:
        fabric, proxy = _join_fabric(
            world, arenas[world.index], layout, bootstrap, settings, timeout_s, memory
        )
    watch = start_watch(world, bootstrap, timeout_s, settings.host_timeout_s)
    try:
        delays_ns = least_delays_ns(bootstrap) if settings.trace else []
    except BaseException:
        watch.close()
        raise
    return Connection(memory, arenas, world.index, fabric, proxy, watch, delays_ns)


_Allocated = tuple[Arena, DescriptorExchange | None]
"""A rank's arena, and how its descriptor is handed over, if it is by one."""


def _share_memory(
    world: World, layout: _core.Layout, bootstrap: Bootstrap, timeout_s: float, memory: RankMemory
) -> list[Arena]:
    with ExitStack() as cleanup:

        def allocate() -> tuple[_Allocated, bytes]:
            arena = memory.create(layout.total_bytes)
            if fabric_handle := memory.fabric_handle(arena):  # a secret of the run, as invitations are
                return (arena, None), fabric_handle
            exchange = cleanup.enter_context(closing(DescriptorExchange(world.index, world.ranks_per_node)))
            return (arena, exchange), exchange.invitation.encode()

        (own, exchange), told = agree(bootstrap, "allocating memory", allocate)
        of_node = [told[rank] for rank in world.node_ranks]

        def shared() -> dict[int, int] | dict[int, bytes]:
            if exchange is None:
                return {index: each for index, each in enumerate(of_node) if index != world.index}
            invitations = [each.decode(errors="replace") for each in of_node]
            descriptors = exchange.exchange(own.descriptor, invitations, timeout_s)
            for descriptor in descriptors.values():
                cleanup.callback(os.close, descriptor)
            return descriptors

        def map_peers() -> tuple[dict[int, Arena], bytes]:
            peers = {index: memory.map(each, own.bytes) for index, each in shared().items()}
            return {world.index: own, **peers}, b""

        arenas, _ = agree(bootstrap, "sharing memory inside the node", map_peers)
        return [arenas[index] for index in range(world.ranks_per_node)]


def _join_fabric(
    world: World,
    arena: Arena,
    layout: _core.Layout,
    bootstrap: Bootstrap,
    settings: Settings,
    timeout_s: float,
    memory: RankMemory,
) -> tuple[_core.SignalPolicy, _core.Proxy]:
    def open_fabric() -> tuple[_core.SignalPolicy, bytes]:
        network = _core.LibfabricFabric(
            provider=settings.provider,
            library=settings.libfabric,
            interface=settings.interface or ("lo" if world.single_host else ""),
            nics=settings.nics_per_rank,
            rank_on_host=world.rank_on_host,
            ranks_on_host=world.ranks_on_host,
            fence=settings.signal_policy == "nic_ordered",
            peers=world.nodes - 1,
            **memory.fabric_arguments(),
        )
        fabric = _core.SignalPolicy.create(settings.signal_policy, network)
        memory.register(fabric, arena)
        return fabric, fabric.address()

    fabric, addresses = agree(bootstrap, "opening the fabric", open_fabric)

    def connect_rail() -> tuple[_core.Proxy, bytes]:
        for rank in world.rail_peers:
            fabric.connect(rank, addresses[rank])
        arguments = {
            "fabric": fabric,
            "layout": layout,
            "rank": world.rank,
            "chunk_bytes": settings.chunk_bytes,
            "ring_commands": settings.ring_commands,
            "timeout_s": timeout_s,
            "own_core": len(os.sched_getaffinity(0)) >= 2 * world.ranks_on_host,
            "trace_spans": settings.traced_spans,
        }
        proxy = _core.Proxy(**{**arguments, **memory.proxy_arguments(arena, layout)})
        return proxy, b""

    # Nobody writes before every target knows every initiator: EFA drops writes of strangers.
    proxy, _ = agree(bootstrap, "connecting the rails", connect_rail)
    return fabric, proxy
