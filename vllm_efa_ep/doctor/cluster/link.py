"""One node's end of the network, with which it measures its link to another node."""

from dataclasses import dataclass
from typing import Any

from vllm_efa_ep import _core
from vllm_efa_ep.config import Settings

_WRITE_BYTES = 256 * 1024
_STREAM_WRITES_PER_NIC = 64
_ROUND_TRIPS_PER_NIC = 100


@dataclass(frozen=True)
class LinkTimes:
    """A working link.

    Attributes:
        latency_s: Half of the median round trip of 8 bytes; 0 on the end that did not start.
        bytes_per_second: In each direction, over all NICs, both directions at once.

    """

    latency_s: float
    bytes_per_second: float


class Endpoint:
    """All NICs of this node and memory to write from and to."""

    def __init__(self, settings: Settings, interface: str, peers: int) -> None:
        """Open the network; ``interface`` is for TCP where ``settings`` name none.

        Raises:
            FabricUnavailableError: There is no usable network.
            ConfigurationError: The settings do not fit this machine.

        """
        self._fabric = _core.LibfabricFabric(
            provider=settings.provider,
            library=settings.libfabric,
            interface=settings.interface or interface,
            nics=0,
            rank_on_host=0,
            ranks_on_host=1,
            fence=False,
            peers=peers,
        )
        self._nics = len(self._fabric.description()["nics"])
        self._arena = _core.Arena.create(_core.link_memory_bytes(self._fabric, _WRITE_BYTES))
        self._fabric.register_memory(self._arena)

    @property
    def description(self) -> dict[str, Any]:
        """``library``, ``provider``, ``fabric`` and ``nics`` of the network."""
        return self._fabric.description()

    @property
    def address(self) -> bytes:
        """What the other nodes need to write here."""
        return self._fabric.address()

    def connect(self, peer: int, address: bytes) -> None:
        """Let a node write here, and be written to.

        Raises:
            ProtocolError: Its network is another one.

        """
        self._fabric.connect(peer, address)

    def measure(self, peer: int, *, session: int, starts: bool, timeout_s: float) -> LinkTimes:
        """Write to ``peer`` and be written to, which must do the same at the same time.

        Args:
            peer: A connected node.
            session: A number that is the same on both ends and new to either.
            starts: True on exactly one of them.
            timeout_s: How long it may take.

        Raises:
            TransportError: A write failed.
            RankTimeoutError: The peer was silent.
            ProtocolError: Bytes arrived wrong.

        """
        times = _core.measure_link(
            fabric=self._fabric,
            arena=self._arena,
            peer=peer,
            starts=starts,
            session=session,
            round_trips=_ROUND_TRIPS_PER_NIC,
            stream_writes=_STREAM_WRITES_PER_NIC * self._nics,
            write_bytes=_WRITE_BYTES,
            timeout_s=timeout_s,
        )
        return LinkTimes(times["latency_s"], times["bytes_per_second"])
