"""``hugepages``: are huge pages reserved for libfabric's and our own memory?"""

import re

from vllm_efa_ep.doctor.check import Check, Finding, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    numbers = dict(
        re.findall(
            r"^(HugePages_Total|HugePages_Free|Hugepagesize):\s+(\d+)",
            system.read("/proc/meminfo") or "",
            re.M,
        )
    )
    total, free = int(numbers.get("HugePages_Total", 0)), int(numbers.get("HugePages_Free", 0))
    mebibytes = int(numbers.get("Hugepagesize", 0)) // 1024
    found = f"{free} of {total} huge pages of {mebibytes} MiB are free"
    if not efa_devices(system):
        return not_applicable(f"{found}; without EFA they save page faults at most")
    return ok(found) if free > 0 else warning(found)


CHECK = Check(
    name="hugepages",
    why=(
        "libfabric's EFA provider keeps its buffers, and each rank its arena, in huge pages where "
        "there are some: the device then translates few addresses. Without, both take ordinary pages."
    ),
    fix=(
        "Host: `sudo sysctl -w vm.nr_hugepages=5128` (what EFA's installer reserves), and in "
        "/etc/sysctl.d to keep it. Kubernetes: `hugepages-2Mi: 5120Mi` in the pod's requests and "
        "limits, with the host's reservation behind it."
    ),
    examine=_examine,
)
