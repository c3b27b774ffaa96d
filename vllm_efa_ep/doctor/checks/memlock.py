"""``memlock``: may this process pin the memory that the NICs write to?"""

import re

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok
from vllm_efa_ep.doctor.hardware import efa_devices
from vllm_efa_ep.doctor.system import System

_CAP_IPC_LOCK = 1 << 14


def _examine(system: System) -> Finding:
    limits = system.read("/proc/self/limits") or ""
    found = re.search(r"^Max locked memory\s+(\S+)", limits, re.MULTILINE)
    limit = found.group(1) if found else "unknown"
    text = "unlimited" if limit == "unlimited" else f"{limit} bytes"
    if not efa_devices(system):
        return not_applicable(f"limit {text}; without EFA no memory is pinned")
    if limit == "unlimited" or (limit.isdigit() and int(limit) >= _memory(system)):
        return ok("no limit on pinned memory, or one above the memory of this machine")
    if _effective_capabilities(system) & _CAP_IPC_LOCK:
        return ok(f"limit {text}, lifted by CAP_IPC_LOCK")
    return failed(f"this process may pin {text}")


def _memory(system: System) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", system.read("/proc/meminfo") or "", re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 1 << 62


def _effective_capabilities(system: System) -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", system.read("/proc/self/status") or "", re.MULTILINE)
    return int(found.group(1), 16) if found else 0


CHECK = Check(
    name="memlock",
    why=(
        "An EFA device writes straight into memory, which must be pinned: all of a rank's arena and "
        "libfabric's queues."
    ),
    fix=(
        "Host: `* - memlock unlimited` in /etc/security/limits.conf, then log in anew; services: "
        "`LimitMEMLOCK=infinity`. Docker: `--ulimit memlock=-1`. Slurm: "
        "`PropagateResourceLimitsExcept=MEMLOCK`. Kubernetes: RLIMIT_MEMLOCK in the container "
        "runtime's base specification (examples/eks/cluster.yaml); the capability IPC_LOCK helps "
        "processes of root only."
    ),
    examine=_examine,
)
