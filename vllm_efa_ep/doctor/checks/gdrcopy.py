"""``gdrcopy``: can the CPU store into GPU memory without the CUDA driver in between?"""

from vllm_efa_ep.doctor.check import Check, Finding, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import nvidia_gpus
from vllm_efa_ep.doctor.system import System

_LIBRARY = "libgdrapi.so.2"


def _examine(system: System) -> Finding:
    if not nvidia_gpus(system):
        return not_applicable("no NVIDIA GPU")
    version = system.read("/sys/module/gdrdrv/version")
    if version is None and not system.exists("/sys/module/gdrdrv"):
        return warning("the kernel module gdrdrv is not loaded")
    if not system.writable("/dev/gdrdrv"):
        return warning("this process cannot open /dev/gdrdrv")
    listed = system.run("ldconfig", "-p")
    if listed is None or _LIBRARY not in listed.text:
        return warning(f"the linker does not know {_LIBRARY}")
    return ok(f"gdrdrv {version or 'of unknown version'} and {_LIBRARY}")


CHECK = Check(
    name="gdrcopy",
    why=(
        "With GDRCopy the proxy stores an arrival straight into GPU memory, where the kernel waits "
        "for it; without, the kernel polls pinned host memory over PCIe. It works, with more latency."
    ),
    fix=(
        "Host: install GDRCopy 2.5 or newer (https://github.com/NVIDIA/gdrcopy) and `sudo modprobe "
        "gdrdrv`. Image: `apt-get install libgdrapi`, or its build, then `ldconfig`. Pod: "
        "`NVIDIA_GDRCOPY=enabled` in its environment, with NVIDIA's container runtime, or a device "
        "plugin; a hostPath would need a privileged pod."
    ),
    examine=_examine,
)
