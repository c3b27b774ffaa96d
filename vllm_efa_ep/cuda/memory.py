"""Plain memory that a rank's kernels and its proxy share, beside the arena."""

import ctypes

from vllm_efa_ep.cuda.driver import bindings, call


class PinnedMemory:
    """Zeroed host memory that kernels read and write over PCIe."""

    def __init__(self, size: int) -> None:
        """Allocate ``size`` bytes.

        Raises:
            CudaError: The driver refuses.

        """
        cuda = bindings()
        purpose = f"allocating {size} bytes of pinned host memory"
        flags = cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP
        self.bytes = size
        #: Where the host finds it.
        self.address = int(call(purpose, "cuMemHostAlloc", size, flags))
        self.clear()
        #: Where kernels find it.
        self.device_address = int(call(purpose, "cuMemHostGetDevicePointer", self.address, 0))

    def clear(self) -> None:
        """Fill it with zeros; neither kernels nor the proxy use it meanwhile."""
        ctypes.memset(self.address, 0, self.bytes)

    def close(self) -> None:
        """Free it; neither kernels nor the proxy may use it any more."""
        call("freeing pinned memory", "cuMemFreeHost", self.address)


class DeviceMemory:
    """Zeroed memory of the GPU that no peer and no NIC reaches."""

    def __init__(self, size: int) -> None:
        """Allocate ``size`` bytes, aligned to 256.

        Raises:
            CudaError: The driver refuses.

        """
        purpose = f"allocating {size} bytes of GPU memory"
        self.bytes = size
        self.address = int(call(purpose, "cuMemAlloc", size))
        self.clear()

    def clear(self) -> None:
        """Fill it with zeros; it is so when this returns, and no kernel uses it meanwhile."""
        call("clearing GPU memory", "cuMemsetD8", self.address, 0, self.bytes)
        call("clearing GPU memory", "cuCtxSynchronize")

    def write(self, image: bytes) -> None:
        """Copy ``image`` to the start; it is there when this returns."""
        purpose = "writing to GPU memory"
        call(purpose, "cuMemcpyHtoD", self.address, image, len(image))
        call(purpose, "cuCtxSynchronize")  # CUDA may return once it has read pageable memory

    def close(self) -> None:
        """Free it."""
        call("freeing GPU memory", "cuMemFree", self.address)
