"""A rank's arena in GPU memory: what ``_core.Arena`` is for CPU memory.

It comes from CUDA's virtual memory management rather than cudaMalloc, so that it has a handle. That is a file
descriptor: local ranks map it with what a Unix socket gives them, without ptrace rights (pidfd_getfd) and
without CUDA IPC. Or it is a fabric handle, 64 bytes that any process of the NVLink domain can map, if it may
use the same IMEX channel (CUDA C++ Programming Guide, "Fabric Memory";
docs.nvidia.com/multi-node-nvlink-systems/imex-guide). The NICs get the same memory as a dma-buf.
"""

import os
import weakref
from contextlib import ExitStack
from typing import Any

from vllm_efa_ep.cuda.driver import Gpu, bindings, call, require_fabric_handles
from vllm_efa_ep.errors import ConfigurationError, CudaError, DeviceUnavailableError


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

    def __init__(
        self,
        gpu: Gpu,
        addresses: AddressRange,
        release: ExitStack,
        descriptor: int = -1,
        fabric_handle: bytes = b"",
    ) -> None:
        """Take over what is mapped at ``addresses``; ``release`` undoes it, at the latest when this dies."""
        self.gpu = gpu
        self.address = addresses.address
        self.bytes = addresses.bytes
        #: None once it is closed.
        self.addresses: AddressRange | None = addresses
        #: To be passed to local peers; -1 for a peer's arena, and with a fabric handle.
        self.descriptor = descriptor
        #: To be told to peers of the NVLink domain; empty for a peer's arena, and with a descriptor.
        self.fabric_handle = fabric_handle
        self._release = weakref.finalize(self, release.close)

    @classmethod
    def create(
        cls, gpu: Gpu, wanted: int, addresses: AddressRange | None = None, fabric: bool = False
    ) -> "DeviceArena":
        """Allocate at least ``wanted`` zero bytes on ``gpu`` that peers can map and NICs can write.

        Args:
            gpu: Where.
            wanted: How many.
            addresses: Those of an earlier arena of this size, at which nothing is mapped any more; default:
                new ones.
            fabric: Give it a fabric handle instead of a descriptor.

        Raises:
            DeviceUnavailableError: The GPU has no fabric handles.
            CudaError: The driver refuses, for example because the GPU's memory is used up.

        """
        if fabric:
            require_fabric_handles(gpu)
        cuda = bindings()
        kind = _fabric() if fabric else _file_descriptor()
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = kind
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
            exported = call(purpose, "cuMemExportToShareableHandle", handle, kind, 0)
            if not fabric:
                cleanup.callback(os.close, exported)
            addresses = AddressRange(size) if addresses is None else addresses
            _map(gpu, handle, addresses, cleanup)
            call(purpose, "cuMemsetD8", addresses.address, 0, size)
            call(purpose, "cuCtxSynchronize")
            shared = {"fabric_handle": bytes(exported.data)} if fabric else {"descriptor": exported}
            return cls(gpu, addresses, cleanup.pop_all(), **shared)

    @classmethod
    def map(cls, gpu: Gpu, shared: int | bytes, size: int) -> "DeviceArena":
        """Map a peer's arena of ``size`` bytes: a descriptor, which stays the caller's, or a fabric handle.

        Raises:
            DeviceUnavailableError: ``gpu`` cannot reach the peer's GPU.
            CudaError: The driver refuses for another reason.

        """
        purpose = "importing a local peer's memory"
        with ExitStack() as cleanup:
            handle = _import(purpose, shared)
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
            return cls(gpu, addresses, cleanup.pop_all())

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
        return DeviceView(self, self.address + offset, size)

    def close(self) -> None:
        """Unmap and free now, and not when the last view of it is gone."""
        self._release()
        self.addresses = None


class DeviceView:
    """Bytes that kernels reach, as numba's array interface describes them to torch."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        """Keep ``owner``, whose memory it is, as long as this lives."""
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
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


def _import(purpose: str, shared: int | bytes) -> Any:
    """Return the allocation behind a descriptor or a fabric handle."""
    if isinstance(shared, int):
        return call(purpose, "cuMemImportFromShareableHandle", shared, _file_descriptor())
    fabric_handle = bindings().CUmemFabricHandle()
    if len(shared) != len(fabric_handle.data):
        raise ConfigurationError(f"a peer told a fabric handle of {len(shared)} bytes; start all ranks alike")
    fabric_handle.data = shared
    return call(purpose, "cuMemImportFromShareableHandle", fabric_handle.getPtr(), _fabric())


def _location(gpu: Gpu) -> Any:
    cuda = bindings()
    location = cuda.CUmemLocation()
    location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = gpu.ordinal
    return location


def _fabric() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC


def _file_descriptor() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
