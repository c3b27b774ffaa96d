"""The CUDA driver, through ``cuda-python``: every call checked, every refusal explained.

``cuda.bindings`` finds libcuda at the first call, so this module loads on machines without a driver.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vllm_efa_ep.errors import CudaError, DeviceUnavailableError

logger = logging.getLogger(__name__)

# What to do about results that users meet when something around the program is not set up.
_REMEDIES: Mapping[str, str] = {
    "CUDA_ERROR_NO_DEVICE": "the driver sees no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and the "
    "container's GPU access",
    "CUDA_ERROR_SYSTEM_NOT_READY": "nvidia-fabricmanager has not set up the NVSwitches; check "
    "`systemctl status nvidia-fabricmanager`, or replace the instance",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "kernel module and libcuda have different versions; reboot after "
    "an update of the driver",
    "CUDA_ERROR_NOT_PERMITTED": "the process may not do this; in a container, grant access to the GPU's "
    "device files, and with EFA_EP_GPU_HANDLES=fabric to an IMEX channel "
    "(/dev/nvidia-caps-imex-channels/channel0)",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is used up; lower max_tokens_per_rank (`vllm-efa-ep plan` "
    "shows arena and received rows of an instance), or vLLM's --gpu-memory-utilization",
}


def bindings() -> ModuleType:
    """Return ``cuda.bindings.driver``.

    Raises:
        DeviceUnavailableError: It is not installed.

    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceUnavailableError(
            f"CUDA tensors need cuda-python, which cannot be imported ({error}); "
            "pip install 'vllm-efa-ep[cuda]'"
        ) from error
    module: ModuleType = driver
    return module


def call(purpose: str, name: str, *arguments: Any) -> Any:
    """Call the driver's function ``name`` and return what it returns beside the result code.

    Args:
        purpose: What the call is for, as the start of an error's text.
        name: For example ``cuMemCreate``.
        arguments: As ``cuda.bindings.driver`` takes them.

    Raises:
        DeviceUnavailableError: There is no driver.
        CudaError: The driver refuses; the message has its reason and, where one is known, the remedy.

    """
    try:
        result, *values = getattr(bindings(), name)(*arguments)
    except RuntimeError as error:  # how cuda.bindings says that libcuda or the function is missing
        raise DeviceUnavailableError(
            f"{purpose}: there is no usable NVIDIA driver here ({error}); install it, or start the "
            "container with GPU access"
        ) from error
    if int(result) != 0:
        remedy = _REMEDIES.get(result.name)
        raise CudaError(f"{purpose}: {name} returned {result.name}" + (f"; {remedy}" if remedy else ""))
    return values[0] if values else None


@dataclass(frozen=True)
class Gpu:
    """An opened GPU.

    Attributes:
        ordinal: CUDA's number of it in this process.
        bus_id: Its PCI address.
        supports_dmabuf: Whether its memory can be exported as dma-buf, which NICs register.
        context: Its primary context, the one that torch uses.

    """

    ordinal: int
    bus_id: str
    supports_dmabuf: bool
    context: Any

    def use(self) -> None:
        """Make it this thread's current GPU; threads start with the first one."""
        call(f"using GPU {self.ordinal}", "cuCtxSetCurrent", self.context)

    def synchronize(self) -> None:
        """Wait until all of its work is done, whoever launched it."""
        self.use()
        call(f"waiting for GPU {self.ordinal}", "cuCtxSynchronize")


def _attribute(ordinal: int, attribute: Any) -> int:
    what = f"asking what GPU {ordinal} can do"
    return int(call(what, "cuDeviceGetAttribute", attribute, call(what, "cuDeviceGet", ordinal)))


def _supports(ordinal: int, attribute: Any) -> bool:
    return _attribute(ordinal, attribute) != 0


def open_gpu(ordinal: int) -> Gpu:
    """Open a GPU, make it this thread's, and check that processes can share its memory.

    Raises:
        DeviceUnavailableError: No driver, no such GPU, or it lacks what the message names.

    """
    cuda = bindings()
    attributes = cuda.CUdevice_attribute
    try:
        call("starting CUDA", "cuInit", 0)
        device = call(f"opening GPU {ordinal}", "cuDeviceGet", ordinal)
        context = call(f"opening GPU {ordinal}", "cuDevicePrimaryCtxRetain", device)
        call(f"opening GPU {ordinal}", "cuCtxSetCurrent", context)
    except CudaError as error:
        raise DeviceUnavailableError(str(error)) from error

    for attribute, lacks, remedy in (
        (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            "virtual memory management",
            "use a GPU from Volta on with a 64-bit driver",
        ),
        (
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            "memory handles that are file descriptors",
            "use a Linux driver, not WSL",
        ),
    ):
        if not _supports(ordinal, attribute):
            raise DeviceUnavailableError(
                f"GPU {ordinal} lacks {lacks} ({attribute.name} is 0), without which ranks cannot share "
                f"memory; {remedy}"
            )
    bus_id = call(f"locating GPU {ordinal}", "cuDeviceGetPCIBusId", 32, device)
    return Gpu(
        ordinal,
        bus_id.split(b"\0")[0].decode(),
        supports_dmabuf=_supports(ordinal, attributes.CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
        context=context,
    )


def require_rdma(gpu: Gpu) -> None:
    """Check that NICs can write to memory of the kind ``DeviceArena`` uses, and running kernels read it then.

    Raises:
        DeviceUnavailableError: They cannot.

    """
    cuda = bindings()
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    if not _supports(gpu.ordinal, attribute):
        raise DeviceUnavailableError(
            f"NICs cannot reach the memory of GPU {gpu.ordinal} ({attribute.name} is 0); use a data-centre "
            "GPU and, in a virtual machine, one that is passed through with its NICs"
        )
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
    owner = cuda.CUGPUDirectRDMAWritesOrdering.CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
    ordering = _attribute(gpu.ordinal, attribute)
    if ordering < owner:
        raise DeviceUnavailableError(
            f"kernels that run on GPU {gpu.ordinal} may not see what NICs have written to it "
            f"({attribute.name} is {ordering}, below {int(owner)}); use a GPU from Hopper on, or run all "
            "ranks on one host, where no NIC takes part"
        )
    if ordering == owner:
        logger.info(
            "EFA EP: GPU %d orders writes of NICs for its own kernels only (%s is %d): other ranks of its "
            "node read rows after those have seen them",
            *(gpu.ordinal, attribute.name, ordering),
        )


def require_fabric_handles(gpu: Gpu) -> None:
    """Check that memory can get handles for other hosts of an NVLink domain.

    Raises:
        DeviceUnavailableError: It cannot.

    """
    attribute = bindings().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED
    if not _supports(gpu.ordinal, attribute):
        raise DeviceUnavailableError(
            f"GPU {gpu.ordinal} has no fabric handles ({attribute.name} is 0): it is not in a multi-node "
            "NVLink domain, or its driver is not set up for one; set EFA_EP_GPU_HANDLES=descriptor, or check "
            "nvidia-imex on all hosts of the domain"
        )
