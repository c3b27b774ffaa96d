"""The CUDA driver's memory calls without a GPU, at the boundary of ``cuda.bindings.driver``.

"Device memory" is a memfd, so a file descriptor that one process exports really maps the same bytes in
another. Types and enumerations stay those of cuda-python. Memory is dirty at first, unreadable until access
was granted, and every object that is not given back is listed in ``live``.
"""

# The methods are the driver's functions, whose names and parameters are not ours.
# ruff: noqa: N802, ARG002, D102

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda

_OK = cuda.CUresult.CUDA_SUCCESS
_HANDLE_TYPE = cuda.CUmemAllocationHandleType
_WRITES_ORDERING = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED = 0x10
_GRANULARITY = 2 << 20
_DIRTY = 0xCD


class FakeDriver:
    """Replaces functions of ``cuda.bindings.driver`` from ``install`` to ``remove``."""

    def __init__(self, bus_ids: tuple[str, ...] = ("0000:53:00.0",)) -> None:
        """One GPU per address."""
        self._bus_ids = bus_ids
        self._numbers = itertools.count(1)
        self._descriptors: dict[int, int] = {}  # of allocations, by handle
        self._kinds: dict[int, Any] = {}  # of their handles
        self._mapped: dict[int, int] = {}  # descriptor by address
        self._refusals: dict[str, Any] = {}
        self._originals: dict[str, Any] = {}
        self.live: set[tuple[str, int]] = set()
        self.attributes: dict[Any, int] = {_WRITES_ORDERING: 200}  # those that differ from 1
        self._calls: list[tuple[int, str]] = []  # thread and name

    def refuse(self, name: str, result: Any) -> None:
        """Let every later call of ``name`` return ``result``."""
        self._refusals[name] = result

    def calls(self) -> list[str]:
        """Return what this thread has called; others may be at work at the same time."""
        return [name for thread, name in self._calls if thread == threading.get_ident()]

    def install(self) -> "FakeDriver":
        """Put the fakes in place."""
        for name in [each for each in dir(self) if each.startswith("cu")]:
            self._originals[name] = getattr(cuda, name)
            setattr(cuda, name, self._recorded(name, getattr(self, name)))
        return self

    def remove(self) -> None:
        """Put the real functions back."""
        for name, original in self._originals.items():
            setattr(cuda, name, original)

    def _recorded(self, name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._calls.append((threading.get_ident(), name))
            if name in self._refusals:
                return (self._refusals[name],)
            values = fake(*arguments)
            return (_OK,) if values is None else (_OK, values)

        return call

    # --- devices ----------------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> None:
        return None

    def cuDeviceGet(self, ordinal: int) -> Any:
        return cuda.CUdevice(ordinal)

    def cuDevicePrimaryCtxRetain(self, device: Any) -> Any:
        return cuda.CUcontext(1)

    def cuCtxSetCurrent(self, context: Any) -> None:
        assert int(context) == 1

    def cuCtxSynchronize(self) -> None:
        return None

    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> int:
        return self.attributes.get(attribute, 1)

    def cuDeviceGetPCIBusId(self, length: int, device: Any) -> bytes:
        return self._bus_ids[int(device)].encode().ljust(length, b"\0")

    # --- virtual memory management ----------------------------------------------------------------------

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> int:
        assert isinstance(properties, cuda.CUmemAllocationProp)
        return _GRANULARITY

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> Any:
        assert flags == 0
        assert size % _GRANULARITY == 0
        assert properties.type == cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert properties.allocFlags.gpuDirectRDMACapable == 1
        descriptor = os.memfd_create("fake_device_memory")
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as whole:
            whole[:] = bytes([_DIRTY]) * size
        allocation = self._allocation(descriptor)
        self._kinds[int(allocation)] = properties.requestedHandleTypes
        return allocation

    def cuMemRelease(self, handle: Any) -> None:
        self.live.remove(("allocation", int(handle)))
        os.close(self._descriptors.pop(int(handle)))

    def cuMemExportToShareableHandle(self, handle: Any, kind: Any, flags: int) -> Any:
        assert (kind, flags) == (self._kinds[int(handle)], 0)
        if kind == _HANDLE_TYPE.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR:
            return os.dup(self._descriptors[int(handle)])
        exported = cuda.CUmemFabricHandle()
        exported.data = f"allocation {int(handle)}".encode().ljust(64, b"\0")
        return exported

    def cuMemImportFromShareableHandle(self, shared: int, kind: Any) -> Any:
        if kind == _HANDLE_TYPE.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR:
            return self._allocation(os.dup(shared))
        assert kind == _HANDLE_TYPE.CU_MEM_HANDLE_TYPE_FABRIC
        told = ctypes.string_at(shared, 64).rstrip(b"\0").decode()
        return self._allocation(os.dup(self._descriptors[int(told.removeprefix("allocation "))]))

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Any:
        assert (alignment, address, flags) == (0, 0, 0)
        reserved = _libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.live.add(("addresses", reserved))
        return cuda.CUdeviceptr(reserved)

    def cuMemAddressFree(self, pointer: Any, size: int) -> None:
        self.live.remove(("addresses", int(pointer)))
        _libc.munmap(int(pointer), size)

    def cuMemMap(self, pointer: Any, size: int, offset: int, handle: Any, flags: int) -> None:
        assert (offset, flags) == (0, 0)
        descriptor = self._descriptors[int(handle)]
        assert os.fstat(descriptor).st_size >= size
        address = _libc.mmap(int(pointer), size, 0, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        assert address == int(pointer)
        self.live.add(("mapping", address))
        self._mapped[address] = descriptor

    def cuMemSetAccess(self, pointer: Any, size: int, access: list[Any], count: int) -> None:
        assert count == len(access) == 1
        assert access[0].flags == cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _libc.mprotect(int(pointer), size, mmap.PROT_READ | mmap.PROT_WRITE)

    def cuMemUnmap(self, pointer: Any, size: int) -> None:
        self.live.remove(("mapping", int(pointer)))
        del self._mapped[int(pointer)]
        _libc.mmap(int(pointer), size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)

    def cuMemGetHandleForAddressRange(self, pointer: int, size: int, kind: Any, flags: int) -> int:
        assert (kind, flags) == (cuda.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0)
        assert size % mmap.PAGESIZE == 0
        return os.dup(self._mapped[pointer])

    # --- plain memory -----------------------------------------------------------------------------------

    def cuMemAlloc(self, size: int) -> Any:
        return cuda.CUdeviceptr(self._anonymous("plain", size))

    def cuMemFree(self, pointer: Any) -> None:
        self.live.remove(("plain", int(pointer)))

    def cuMemHostAlloc(self, size: int, flags: int) -> int:
        assert flags == cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP
        return self._anonymous("host", size)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> Any:
        assert flags == 0
        return cuda.CUdeviceptr(address)

    def cuMemFreeHost(self, address: int) -> None:
        self.live.remove(("host", address))

    def cuMemsetD8(self, pointer: Any, value: int, size: int) -> None:
        ctypes.memset(int(pointer), value, size)

    def cuMemsetD32Async(self, pointer: int, value: int, count: int, stream: Any) -> None:
        ctypes.memmove(pointer, value.to_bytes(4, "little") * count, 4 * count)

    def cuMemcpyHtoD(self, pointer: Any, source: Any, size: int) -> None:
        ctypes.memmove(int(pointer), bytes(source), size)

    def _allocation(self, descriptor: int) -> Any:
        handle = next(self._numbers)
        self._descriptors[handle] = descriptor
        self.live.add(("allocation", handle))
        return cuda.CUmemGenericAllocationHandle(handle)

    def _anonymous(self, kind: str, size: int) -> int:
        address: int = _libc.mmap(
            None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        ctypes.memset(address, _DIRTY, size)
        self.live.add((kind, address))
        return address
