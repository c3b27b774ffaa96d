"""``hw-counters``: can the counters of the EFA devices be read, and how often do they change?"""

from vllm_efa_ep.doctor.check import Check, Finding, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_rdma_devices
from vllm_efa_ep.doctor.system import System

_LONGEST_LIFESPAN_MS = 1000  # older ones lag behind what is looked for; the kernel's default is 10
# drivers/infiniband/hw/efa/efa_verbs.c
_NEEDED = ("rdma_write_bytes", "rdma_write_recv_bytes", "rdma_write_wrs", "rx_drops")


def _examine(system: System) -> Finding:
    devices = efa_rdma_devices(system)
    if not devices:
        return not_applicable("no EFA device with a driver")
    for device in devices:
        directory = f"/sys/class/infiniband/{device}/ports/1/hw_counters"
        missing = [name for name in _NEEDED if not (system.read(f"{directory}/{name}") or "").isdigit()]
        if missing:
            return warning(f"{device} does not show {', '.join(missing)} in {directory}")
        lifespan = system.read(f"{directory}/lifespan") or ""
        if lifespan.isdigit() and int(lifespan) > _LONGEST_LIFESPAN_MS:
            return warning(f"{device} shows its counters as they were up to {lifespan} ms ago")
    clock = f"; the kernel asks the device again after {lifespan} ms" if lifespan else ""
    return ok(f"the counters of all {len(devices)} EFA devices can be read{clock}")


CHECK = Check(
    name="hw-counters",
    why=(
        "Growing rdma_write_bytes is the proof that rows really travel over EFA; retransmissions and "
        "drops show trouble."
    ),
    fix=(
        "Install the newest EFA driver on the host (see efa-driver), mount the host's /sys read-only "
        "into the container, and compare `cat "
        "/sys/class/infiniband/*/ports/1/hw_counters/rdma_write_bytes` before and after a run. Counters that "
        "are old when they are read: `echo 10 > .../hw_counters/lifespan` on the host."
    ),
    examine=_examine,
)
