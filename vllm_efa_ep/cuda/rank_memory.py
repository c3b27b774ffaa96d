"""A rank on a GPU: its arena, the NICs and CPUs near it, and what its kernels share with its proxy."""

import logging
import os
from contextlib import ExitStack
from typing import Any

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.config import Settings
from vllm_efa_ep.cuda.arena import DeviceArena, DeviceView
from vllm_efa_ep.cuda.driver import Gpu, open_gpu, require_rdma
from vllm_efa_ep.cuda.gdrcopy import GdrCopy
from vllm_efa_ep.cuda.halves import CudaHalves
from vllm_efa_ep.cuda.kept_memory import KeptMemory
from vllm_efa_ep.cuda.memory import PinnedMemory
from vllm_efa_ep.cuda.stand_in import GpuStandIn
from vllm_efa_ep.cuda.streams import current_device, current_ordinal
from vllm_efa_ep.errors import ConfigurationError, DeviceUnavailableError
from vllm_efa_ep.pci_topology import gpu_affinity
from vllm_efa_ep.rank_memory import Halves
from vllm_efa_ep.watch import CheckWait

logger = logging.getLogger(__name__)

_ERROR_WORD_BYTES = 8


class GpuMemory:
    """The memory of a rank on torch's current GPU, for one generation."""

    def __init__(self, settings: Settings, kept: KeptMemory | None) -> None:
        """Choose this thread's GPU, which ``create`` opens: where it fails, the other ranks learn of it.

        Args:
            settings: For all ranks.
            kept: Of the generations before and after this one; None if there is no other, as for a stand-in.

        """
        self._settings = settings
        self._ordinal = current_ordinal()
        self.device = current_device()
        #: Entries of the ring of commands, a power of two.
        self._ring_commands = 1 << (settings.ring_commands - 1).bit_length()
        self._signals_in_arena = False
        self._gpu: Gpu | None = None
        self._host: PinnedMemory | None = None
        self._core: _core.CudaDevice | None = None
        self._cleanup = ExitStack()
        if kept is None:
            kept = KeptMemory()
            self._cleanup.callback(kept.close)
        self._kept = kept

    def create(self, size: int) -> DeviceArena:
        """Open the GPU, and allocate the arena.

        Raises:
            DeviceUnavailableError: No driver, or the GPU lacks something that the message names.
            CudaError: The driver refuses.

        """
        self._kept.stay_on(self._ordinal)
        self._gpu = open_gpu(self._ordinal)
        return self._kept.arena(self._gpu, size, self._settings.gpu_handles == "fabric")

    def fabric_handle(self, arena: DeviceArena) -> bytes:
        """Return what peers map in the place of its descriptor, if it has none."""
        return arena.fabric_handle

    def map(self, shared: int | bytes, size: int) -> DeviceArena:
        """Map a peer's arena."""
        gpu = self._opened()
        gpu.use()
        return DeviceArena.map(gpu, shared, size)

    def tensor(self, arena: DeviceArena, offset: int, size: int) -> torch.Tensor:
        """Return bytes of an arena; they keep it mapped."""
        return _tensor(arena.view(offset, size), self.device)

    def fabric_arguments(self) -> dict[str, Any]:
        """Choose the NICs near the GPU; log which, and why.

        Raises:
            DeviceUnavailableError: NICs cannot reach the GPU's memory.

        """
        gpu = self._opened()
        require_rdma(gpu)
        affinity = gpu_affinity(gpu.bus_id)
        logger.info(
            "EFA EP: GPU %s takes NICs %s by %s, NUMA node %s",
            affinity.gpu,
            ", ".join(affinity.nics) or "none",
            affinity.locality.value,
            affinity.numa_node,
        )
        return {"rdma_devices": list(affinity.nics), "device_memory": True}

    def register(self, fabric: _core.Fabric, arena: DeviceArena) -> None:
        """Register the arena with every NIC, by dma-buf if the driver exports one."""
        gpu = self._opened()
        gpu.use()
        dmabuf = arena.export_dmabuf()
        try:
            fabric.register_device_memory(arena.address, arena.bytes, dmabuf, gpu.ordinal)
        finally:
            if dmabuf >= 0:
                os.close(dmabuf)

    def proxy_arguments(self, arena: DeviceArena, layout: _core.Layout) -> dict[str, Any]:
        """Place ring and signals, and pin the proxy's thread to the GPU's NUMA node."""
        host = self._host_block(layout)
        near = gpu_affinity(self._opened().bus_id).cpus & os.sched_getaffinity(0)
        signals = self._map_signals(arena, layout)
        self._signals_in_arena = signals is not None
        if signals is None:
            signals = host.address + _core.cuda_signals_offset(self._ring_commands)
        return {
            "arena": None,
            "commands": _core.DeviceRing(host_address=host.address, ring_commands=self._ring_commands),
            "signals": signals,
            "signals_combine_writes": self._signals_in_arena,
            "cpus": sorted(near),
            "own_core": True,  # kernels cannot do the proxy's work
        }

    def make_halves(self, arguments: dict[str, Any], check_wait: CheckWait) -> Halves:
        """Return the halves as kernels; ``arguments`` are those of ``_core.CpuDevice``."""
        self._core = self._make_device(arguments, check_wait)
        return CudaHalves(self._core, arguments["layout"], arguments["per_expert"], self._ordinal)

    def make_stand_in(self, arguments: dict[str, Any], server: "GpuMemory") -> GpuStandIn:
        """Return what serves a lost rank's position; ``server`` is the memory of the rank that does."""
        # Its kernels are those of the server, for no tokens: CUDA may load another one only when the GPU is
        # idle, while the server's wait for those.
        device = self._make_device(arguments, lambda *_: None)
        host, server_host = self._host_block(arguments["layout"]), server._host_block(arguments["layout"])
        return GpuStandIn(device, host.address, server_host.address, self._ordinal)

    def _make_device(self, arguments: dict[str, Any], check_wait: CheckWait) -> _core.CudaDevice:
        host = self._host_block(arguments["layout"])
        core = _core.CudaDevice(
            **{**arguments, "arenas": [arena.address for arena in arguments["arenas"]]},
            num_sms=self._settings.num_sms,
            chunk_bytes=self._settings.chunk_bytes,
            host_address=host.address,
            host_address_on_device=host.device_address,
            ring_commands=self._ring_commands,
            signals_in_arena=self._signals_in_arena,
            check_wait=check_wait,
        )
        workspace = self._kept.workspace(core.workspace_bytes)
        workspace.write(core.use_workspace(workspace.address))
        return core

    def first_room(self, capacity: int) -> int:
        """Kernels pack without asking the host, so there must be room for everything."""
        return capacity

    def fault_word(self) -> torch.Tensor | None:
        """Return the word in which kernels leave the first fault, to be read in the order of a stream."""
        if self._host is None:
            return None
        address = self._host.device_address + _core.cuda_error_offset
        return _tensor(DeviceView(self._host, address, _ERROR_WORD_BYTES), self.device)

    def raise_fault(self) -> None:
        """Raise what kernels have left in that word, or the proxy's failure."""
        if self._core is not None:
            self._core.throw_if_failed()

    def wait(self) -> None:
        """Wait for the kernels, and thereby until all their commands are in the ring."""
        if self._gpu is not None:
            self._gpu.synchronize()

    def end_waits(self) -> None:
        """Let no kernel wait for another rank any more."""
        if self._host is not None:
            _core.cuda_stop(self._host.address)

    def stop(self) -> None:
        """End waits, and let go of the device."""
        self.end_waits()
        self._core = None  # which would keep the proxy alive

    def close(self) -> None:
        """Free what is not kept, and not the arena, after ``stop`` and ``wait``."""
        self._cleanup.close()

    def _opened(self) -> Gpu:
        if self._gpu is None:
            raise ConfigurationError("the arena comes before everything else that needs the GPU")
        return self._gpu

    def _host_block(self, layout: _core.Layout) -> PinnedMemory:
        if self._host is None:
            self._host = self._kept.host(_core.cuda_host_bytes(self._ring_commands, layout))
        return self._host

    def _map_signals(self, arena: DeviceArena, layout: _core.Layout) -> int | None:
        """Map the arena's signals for the proxy, or return None for signals in pinned memory."""
        if self._settings.gpu_signals == "pinned":
            return None
        try:
            gdrcopy = GdrCopy()
            self._cleanup.callback(gdrcopy.close)
            return gdrcopy.map(arena.address, layout.signal_bytes)
        except DeviceUnavailableError as error:
            if self._settings.gpu_signals == "gdrcopy":
                raise
            logger.info("EFA EP: kernels poll signals in host memory, over PCIe, since %s", error)
            return None


def _tensor(view: DeviceView, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(view, device=device)
