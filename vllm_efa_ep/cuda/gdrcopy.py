"""GDRCopy: GPU memory in the CPU's address space, through the GPU's PCIe window.

It lets the proxy store arrivals where kernels poll them, in the GPU's own memory. The library is opened at
run time, as libfabric is. Its calls are those of gdrapi.h since GDRCopy 2.0 (github.com/NVIDIA/gdrcopy).
"""

import ctypes
import os
from contextlib import ExitStack
from pathlib import Path

from vllm_efa_ep.errors import DeviceUnavailableError

# Pages of the window (GPU_PAGE_SIZE in gdrapi.h); pinned ranges consist of whole ones.
_PAGE = 64 << 10


class _Handle(ctypes.Structure):
    """gdr_mh_t, which the library takes by value."""

    _fields_ = [("h", ctypes.c_ulong)]


class GdrCopy:
    """An opened libgdrapi."""

    def __init__(self, library: str = "libgdrapi.so.2") -> None:
        """Open the library and its kernel driver.

        Raises:
            DeviceUnavailableError: One of them is missing; the message says which.

        """
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceUnavailableError(
                f"GDRCopy's library cannot be opened ({error}); install gdrcopy (libgdrapi2)"
            ) from error
        _declare(self._library)
        self._context = self._library.gdr_open()
        if not self._context:
            raise DeviceUnavailableError(
                "GDRCopy's kernel driver cannot be opened: /dev/gdrdrv "
                + (
                    "does not exist; load the module gdrdrv (gdrcopy-kmod), in a container mount it"
                    if not Path("/dev/gdrdrv").exists()
                    else "exists, but this process may not use it; check its permissions"
                )
            )
        self._cleanup = ExitStack()
        self._cleanup.callback(self._library.gdr_close, self._context)

    def map(self, address: int, size: int) -> int:
        """Map GPU memory and return where the CPU writes it; write-combined, so stores need a fence.

        Raises:
            DeviceUnavailableError: The driver refuses.

        """
        first = address // _PAGE * _PAGE
        length = -(-(address + size - first) // _PAGE) * _PAGE
        handle, window = _Handle(), ctypes.c_void_p()
        with ExitStack() as cleanup:
            self._call("gdr_pin_buffer", first, length, 0, 0, ctypes.byref(handle))
            cleanup.callback(self._call, "gdr_unpin_buffer", handle)
            self._call("gdr_map", handle, ctypes.byref(window), length)
            cleanup.callback(self._call, "gdr_unmap", handle, window, length)
            self._cleanup.push(cleanup.pop_all())
        return (window.value or 0) + (address - first)

    def close(self) -> None:
        """Unmap all; nobody may write there any more."""
        self._cleanup.close()

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(self._context, *arguments)
        if result != 0:
            raise DeviceUnavailableError(
                f"{name} failed: {os.strerror(abs(result))} ({result}); compare the versions of libgdrapi, "
                "gdrdrv and the NVIDIA driver"
            )


def _declare(library: ctypes.CDLL) -> None:
    context, size, handle = ctypes.c_void_p, ctypes.c_size_t, _Handle
    library.gdr_open.restype = context
    library.gdr_open.argtypes = []
    library.gdr_close.argtypes = [context]
    library.gdr_pin_buffer.argtypes = [
        context,
        ctypes.c_ulong,
        size,
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.POINTER(handle),
    ]
    library.gdr_unpin_buffer.argtypes = [context, handle]
    library.gdr_map.argtypes = [context, handle, ctypes.POINTER(ctypes.c_void_p), size]
    library.gdr_unmap.argtypes = [context, handle, ctypes.c_void_p, size]
