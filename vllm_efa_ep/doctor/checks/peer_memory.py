"""``peer-memory``: can the EFA devices reach GPU memory, by dma-buf or by a peer-memory module?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, kernel_version, nvidia_gpus, version_tuple
from vllm_efa_ep.doctor.system import System

# ib_umem_dmabuf_get() came with Linux 5.12; only NVIDIA's open kernel modules export dma-bufs.
_DMABUF_KERNEL = (5, 12)
_PEER_MODULES = ("nvidia_peermem", "efa_nv_peermem")


def _examine(system: System) -> Finding:
    if not nvidia_gpus(system) or not efa_devices(system):
        return not_applicable("needs an NVIDIA GPU and an EFA device")
    driver = (system.read("/proc/driver/nvidia/version") or "").partition("\n")[0]
    if not driver:
        return failed("the NVIDIA kernel driver is not loaded")
    kernel = kernel_version(system)
    open_modules = "Open Kernel Module" in driver
    if open_modules and version_tuple(kernel) >= _DMABUF_KERNEL:
        return ok(f"dma-buf: Linux {kernel} and NVIDIA's open kernel modules")
    reason = (
        f"Linux {kernel} has no dma-buf for RDMA" if open_modules else "NVIDIA's driver is not the open one"
    )
    loaded = [name for name in _PEER_MODULES if system.exists(f"/sys/module/{name}")]
    if loaded:
        return warning(f"{loaded[0]} instead of dma-buf: {reason}")
    return failed(f"neither dma-buf ({reason}) nor {' or '.join(_PEER_MODULES)}")


CHECK = Check(
    name="peer-memory",
    why=(
        "GPUDirect RDMA: the NIC reads and writes GPU memory itself. libfabric's efa-direct has no other way."
    ),
    fix=(
        "Install NVIDIA's open kernel modules (`sudo apt-get install nvidia-open`, or `sudo dnf "
        "install nvidia-open`) on Linux 5.12 or newer; with the closed driver `sudo modprobe "
        "nvidia-peermem`."
    ),
    examine=_examine,
)
