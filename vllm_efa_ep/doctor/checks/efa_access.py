"""``efa-access``: may this process open the EFA devices?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_rdma_devices
from vllm_efa_ep.doctor.system import System

_DIRECTORY = "/dev/infiniband"


def _examine(system: System) -> Finding:
    devices = efa_rdma_devices(system)
    if not devices:
        return not_applicable("no EFA device with a driver")
    nodes = [name for name in system.names(_DIRECTORY) if name.startswith("uverbs")]
    usable = [name for name in nodes if system.writable(f"{_DIRECTORY}/{name}")]
    found = f"this process can open {len(usable)} of {len(devices)} EFA devices in {_DIRECTORY}"
    if not usable:
        return failed(found)
    return ok(found) if len(usable) >= len(devices) else warning(found)


CHECK = Check(
    name="efa-access",
    why=(
        "libfabric opens one /dev/infiniband/uverbs file for each EFA device; a container sees only "
        "those it was given."
    ),
    fix=(
        "Kubernetes: request all of the node's devices, for example `vpc.amazonaws.com/efa: 16` on "
        "p5en, in the pod's limits, and run the EFA device plugin (examples/eks). Docker: `--device "
        "/dev/infiniband`. Host: `sudo chmod 0666 /dev/infiniband/uverbs*`, as the EFA installer's "
        "udev rule does."
    ),
    examine=_examine,
)
