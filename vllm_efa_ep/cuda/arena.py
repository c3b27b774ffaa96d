"""A rank's arena in GPU memory: what ``_core.Arena`` is for CPU memory.

It comes from CUDA's virtual memory management rather than cudaMalloc, so that it has a file
descriptor: local ranks map it with what a Unix socket gives them, without ptrace rights (pidfd_getfd) and
without CUDA IPC. The NICs get the same memory as a dma-buf.
"""

import os
import weakref
from contextlib import ExitStack
from typing import Any

from vllm_efa_ep.cuda.driver import Gpu, bindings, call
from vllm_efa_ep.errors import CudaError, DeviceUnavailableError


class AddressRange:
    """Reserved addresses, at which memory can be mapped and exchanged for other memory."""

    def __init__(self, size: int) -> None:
        """Reserve ``size`` bytes, a multiple of the GPU's granularity.

        Raises:
            CudaError: The driver refuses.

        """
        self.bytes = size
        self.address = int(call(f"reserving {size} addresses", "cuMemAddressReserve", size, 0, 0, 0))
        weakref.finalize(self, call, "freeing addresses", "cuMemAddressFree", self.address, size)


class DeviceArena:
    """GPU memory that this process maps, its own or a local peer's."""

    huge_pages = False  # of the operating system, which has no part in this

    def __init__(self, gpu: Gpu, addresses: AddressRange, descriptor: int, release: ExitStack) -> None:
        """Take over what is mapped at ``addresses``; ``release`` undoes it, at the latest when this dies."""
        self.gpu = gpu
        self.address = addresses.address
        self.bytes = addresses.bytes
        #: None once it is closed.
        self.addresses: AddressRange | None = addresses
        #: To be passed to local peers; -1 for a peer's arena.
        self.descriptor = descriptor
        self._release = weakref.finalize(self, release.close)

    @classmethod
    def create(cls, gpu: Gpu, wanted: int, addresses: AddressRange | None = None) -> "DeviceArena":
        """Allocate at least ``wanted`` zero bytes on ``gpu`` that peers can map and NICs can write.

        Args:
            gpu: Where.
            wanted: How many.
            addresses: Those of an earlier arena of this size, at which nothing is mapped any more; default:
                new ones.

        Raises:
            CudaError: The driver refuses, for example because the GPU's memory is used up.

        """
        cuda = bindings()
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = _file_descriptor()
        properties.location = _location(gpu)
        properties.allocFlags.gpuDirectRDMACapable = 1
        granularity = call(
            f"allocating on GPU {gpu.ordinal}",
            "cuMemGetAllocationGranularity",
            properties,
            cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        )
        size = -(-wanted // granularity) * granularity
        purpose = f"allocating {size} bytes on GPU {gpu.ordinal}"
        with ExitStack() as cleanup:
            handle = call(purpose, "cuMemCreate", size, properties, 0)
            cleanup.callback(call, "freeing", "cuMemRelease", handle)
            descriptor = call(purpose, "cuMemExportToShareableHandle", handle, _file_descriptor(), 0)
            cleanup.callback(os.close, descriptor)
            addresses = AddressRange(size) if addresses is None else addresses
            _map(gpu, handle, addresses, cleanup)
            call(purpose, "cuMemsetD8", addresses.address, 0, size)
            call(purpose, "cuCtxSynchronize")
            return cls(gpu, addresses, descriptor, cleanup.pop_all())

    @classmethod
    def map(cls, gpu: Gpu, descriptor: int, size: int) -> "DeviceArena":
        """Map a local peer's arena of ``size`` bytes; the descriptor stays the caller's.

        Raises:
            DeviceUnavailableError: ``gpu`` cannot reach the peer's GPU.
            CudaError: The driver refuses for another reason.

        """
        purpose = "importing a local peer's memory"
        with ExitStack() as cleanup:
            handle = call(purpose, "cuMemImportFromShareableHandle", descriptor, _file_descriptor())
            cleanup.callback(call, "freeing", "cuMemRelease", handle)
            addresses = AddressRange(size)
            try:
                _map(gpu, handle, addresses, cleanup)
            except CudaError as error:
                if "CUDA_ERROR_INVALID_DEVICE" not in str(error):
                    raise
                raise DeviceUnavailableError(
                    f"GPU {gpu.ordinal} cannot reach a local peer's GPU ({error}); ranks of one node need "
                    "NVLink or PCIe peer access (`nvidia-smi topo -p2p rw`), or set EFA_EP_RANKS_PER_NODE=1"
                ) from error
            return cls(gpu, addresses, -1, cleanup.pop_all())

    def export_dmabuf(self) -> int:
        """Return a dma-buf of the whole arena, the caller's to close; -1 where the driver has none.

        NICs then register the address instead, for which the kernel needs a peer-memory module.
        """
        if not self.gpu.supports_dmabuf:
            return -1
        handle_type = bindings().CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        purpose = f"exporting memory of GPU {self.gpu.ordinal} to the NICs"
        return int(call(purpose, "cuMemGetHandleForAddressRange", self.address, self.bytes, handle_type, 0))

    def view(self, offset: int, size: int) -> "DeviceView":
        """Return bytes of the arena for ``torch.as_tensor``; they keep it mapped."""
        return DeviceView(self, offset, size)

    def close(self) -> None:
        """Unmap and free now, and not when the last view of it is gone."""
        self._release()
        self.addresses = None


class DeviceView:
    """Bytes of a device arena, as numba's array interface describes them to torch."""

    def __init__(self, arena: DeviceArena, offset: int, size: int) -> None:
        """Keep ``arena`` as long as this lives."""
        self._arena = arena
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (arena.address + offset, False),
            "strides": None,
            "version": 3,
        }


def _map(gpu: Gpu, handle: Any, addresses: AddressRange, cleanup: ExitStack) -> None:
    """Map an allocation where this process and ``gpu`` can use it; what undoes that goes onto ``cleanup``."""
    pointer, size = addresses.address, addresses.bytes
    purpose = f"mapping {size} bytes for GPU {gpu.ordinal}"
    cuda = bindings()
    call(purpose, "cuMemMap", pointer, size, 0, handle, 0)
    cleanup.callback(call, "unmapping", "cuMemUnmap", pointer, size)
    access = cuda.CUmemAccessDesc()
    access.location = _location(gpu)
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call(purpose, "cuMemSetAccess", pointer, size, [access], 1)


def _location(gpu: Gpu) -> Any:
    cuda = bindings()
    location = cuda.CUmemLocation()
    location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = gpu.ordinal
    return location


def _file_descriptor() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
