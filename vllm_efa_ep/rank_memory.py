"""Where a rank's arena lies, CPU or GPU, and what follows for its fabric, proxy and halves."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from vllm_efa_ep import _core
from vllm_efa_ep.config import Settings
from vllm_efa_ep.cpu_cache import own_cache_bytes
from vllm_efa_ep.errors import ConfigurationError, DeviceUnavailableError
from vllm_efa_ep.watch import CheckWait

if TYPE_CHECKING:
    from vllm_efa_ep.cuda.kept_memory import KeptMemory


class Arena(Protocol):
    """Memory of a rank that its node maps: ``_core.Arena`` or ``cuda.arena.DeviceArena``."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def descriptor(self) -> int:
        """What local peers map; -1 for a peer's."""

    @property
    def huge_pages(self) -> bool:
        """Whether it lies in 2 MiB pages of the operating system."""


class Halves(Protocol):
    """The halves of a rank; addresses are of tensors on its device, row by row (``csrc/bindings``)."""

    def dispatch_send(
        self,
        channel: int,
        x: int,
        x_stride: int,
        scales: int,
        ids: int,
        ids_are_64_bit: bool,
        weights: int,
        tokens: int,
        token_count: int,
    ) -> None:
        """Start a round; ``token_count`` is the address of how many of ``tokens`` count, or 0: all."""

    def dispatch_recv(
        self, channel: int, room: int, x: int, scales: int, ids: int, weights: int, tokens_per_expert: int
    ) -> int:
        """Receive, and return the number of rows; more than ``room`` are left for ``dispatch_pack``."""

    def dispatch_pack(
        self, channel: int, x: int, scales: int, ids: int, weights: int, tokens_per_expert: int
    ) -> None:
        """Write the rows for which there was no room."""

    def combine_send(self, channel: int, rows: int, per_slot: bool, weights_applied: bool) -> None:
        """Send results back."""

    def combine_recv(self, channel: int, out: int) -> None:
        """Write the own tokens' results."""

    def counters(self) -> dict[str, Any]:
        """Return totals since the start."""

    def half_seconds(self) -> dict[str, float]:
        """Return the time inside each half."""

    def wait_seconds(self) -> dict[str, float]:
        """Return how much of it was waiting for other ranks."""

    def half_buckets(self) -> dict[str, list[int]]:
        """Return a histogram of the time in each half; ``duration_bounds()`` are its bounds."""

    def wait_buckets(self) -> dict[str, list[int]]:
        """Return a histogram of the waiting in each half."""

    def waited_for_seconds(self) -> list[float]:
        """Return, by rank, the time of waits for which it was the last one missing."""

    def trace(self) -> list[dict[str, Any]]:
        """Return the spans of halves and waits; no half may be running."""

    def dropped_spans(self) -> int:
        """Return how many older spans were replaced."""


class StandInCore(Protocol):
    """What runs the halves of a lost rank's position: ``_core.StandIn`` or ``cuda.stand_in.GpuStandIn``."""

    def start_round(self, channel: int) -> None:
        """Run one round more, if it does not notice by itself that one began."""

    def wait_until_idle(self, most_s: float) -> bool:
        """Wait until every round that was begun is over, or ``most_s`` has passed; say which."""

    def stop(self) -> None:
        """End its threads and waits; safe to repeat."""

    def throw_if_failed(self) -> None:
        """Raise what ended a round."""


class RankMemory(Protocol):
    """One rank's memory, and what knows of which kind it is."""

    device: torch.device

    def create(self, size: int) -> Any:
        """Allocate the arena."""

    def fabric_handle(self, arena: Any) -> bytes:
        """Return what peers map in the place of its descriptor, on other hosts, too; empty: they cannot."""

    def map(self, shared: Any, size: int) -> Any:
        """Map a peer's arena: its descriptor, or its fabric handle."""

    def tensor(self, arena: Any, offset: int, size: int) -> torch.Tensor:
        """Return bytes of an arena as uint8 ``[size]``; they keep it mapped."""

    def fabric_arguments(self) -> dict[str, Any]:
        """Return what ``_core.LibfabricFabric`` is to know of this memory."""

    def register(self, fabric: Any, arena: Any) -> None:
        """Register the arena with every NIC."""

    def proxy_arguments(self, arena: Any, layout: _core.Layout) -> dict[str, Any]:
        """Return what ``_core.Proxy`` is to know of this memory."""

    def make_halves(self, arguments: dict[str, Any], check_wait: CheckWait) -> Halves:
        """Return the halves on connected memory; ``arguments`` are those of ``_core.CpuDevice``."""

    def make_stand_in(self, arguments: dict[str, Any], server: Any) -> StandInCore:
        """Return what serves a lost rank's position here; ``server`` is the memory of this process's rank."""

    def first_room(self, capacity: int) -> int:
        """Return for how many rows the output has room at the start; it grows where it can."""

    def fault_word(self) -> torch.Tensor | None:
        """Return bytes that are not 0 once a half has failed; None where a half that fails raises."""

    def raise_fault(self) -> None:
        """Raise the failure of a half that could not raise it."""

    def wait(self) -> None:
        """Wait for the halves that were called; each has its own deadline."""

    def end_waits(self) -> None:
        """End waits that nobody will answer, from any thread, where halves do not ask for that themselves."""

    def stop(self) -> None:
        """End waits of halves that still run: their memory goes. ``wait`` for them."""

    def close(self) -> None:
        """Free what is not the arena, after proxy and halves are gone."""


class HostMemory:
    """Memory of the CPU."""

    device = torch.device("cpu")

    def __init__(self, traced_spans: int = 0) -> None:
        """Keep as many of the newest spans of each channel for a trace."""
        self._traced_spans = traced_spans

    def create(self, size: int) -> _core.Arena:
        """Allocate the arena."""
        return _core.Arena.create(size)

    def fabric_handle(self, arena: _core.Arena) -> bytes:  # noqa: ARG002
        """Return none: no other host can map it."""
        return b""

    def map(self, descriptor: int, size: int) -> _core.Arena:
        """Map a local peer's arena."""
        return _core.Arena.map(descriptor, size)

    def tensor(self, arena: _core.Arena, offset: int, size: int) -> torch.Tensor:
        """Return bytes of an arena."""
        return from_dlpack(arena.view(offset, size))

    def fabric_arguments(self) -> dict[str, Any]:
        """NICs are the rank's share of the host's."""
        return {}

    def register(self, fabric: _core.Fabric, arena: _core.Arena) -> None:
        """Register the arena with every NIC."""
        fabric.register_memory(arena)

    def proxy_arguments(self, arena: _core.Arena, layout: _core.Layout) -> dict[str, Any]:  # noqa: ARG002
        """Signals lie in the arena, and ranks submit commands by calls."""
        return {"arena": arena}

    def make_halves(self, arguments: dict[str, Any], check_wait: CheckWait) -> Halves:
        """Return the halves on the CPU."""
        # More rows than that are cold again before they are read: the experts' weights come in between.
        cached_bytes = own_cache_bytes()
        return _core.CpuDevice(
            **arguments, check_wait=check_wait, trace_spans=self._traced_spans, cached_bytes=cached_bytes
        )

    def make_stand_in(self, arguments: dict[str, Any], server: "HostMemory") -> StandInCore:  # noqa: ARG002
        """Return the halves in threads, which have no tokens to quantise."""
        return _core.StandIn(**{name: arguments[name] for name in arguments if name != "quantisation"})

    def first_room(self, capacity: int) -> int:  # noqa: ARG002
        """Rows are counted before they are packed, so room can wait."""
        return 0

    def fault_word(self) -> torch.Tensor | None:
        """Halves raise."""
        return None

    def raise_fault(self) -> None:
        """Halves raise."""

    def wait(self) -> None:
        """Halves are over when they return."""

    def end_waits(self) -> None:
        """Halves ask."""

    def stop(self) -> None:
        """Halves are over when they return."""

    def close(self) -> None:
        """Nothing but the arena was allocated."""


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda" for a configuration's ``device``, which may be "auto".

    Raises:
        DeviceUnavailableError: CUDA is asked for, or torch has GPUs, and this build has no kernels.

    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not _core.cuda_architectures:
        raise DeviceUnavailableError(
            "this build of vllm_efa_ep has no CUDA kernels; install a wheel with them, build it where nvcc "
            'is on PATH, or set AllToAllConfig.device="cpu"'
        )
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"device is {device!r}; use auto, cpu or cuda")
    return device


def kept_memory_for(device: str) -> "KeptMemory | None":
    """Return what a rank keeps from generation to generation: nothing on the CPU."""
    if device == "cpu":
        return None
    from vllm_efa_ep.cuda.kept_memory import KeptMemory

    return KeptMemory()


def memory_for(device: str, settings: Settings, kept: "KeptMemory | None") -> RankMemory:
    """Return a rank's memory for one generation.

    Args:
        device: "cpu", or "cuda" for this thread's current GPU.
        settings: Of this rank.
        kept: ``kept_memory_for`` this rank; None for a stand-in, which keeps nothing.

    """
    if device == "cpu":
        return HostMemory(settings.traced_spans)
    from vllm_efa_ep.cuda.rank_memory import GpuMemory

    return GpuMemory(settings, kept)
