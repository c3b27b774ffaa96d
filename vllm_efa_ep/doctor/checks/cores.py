"""``cores``: are there two CPU cores for every rank?"""

import re

from vllm_efa_ep.doctor.check import Check, Finding, ok, warning
from vllm_efa_ep.doctor.hardware import nvidia_gpus
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    ranks = max(1, len(nvidia_gpus(system)))
    cores = _allowed_cores(system)
    quota = _quota(system)
    usable = min(cores, quota) if quota else cores
    limit = f", of which the container may use {quota:g}" if quota else ""
    found = f"{cores} cores{limit} for {ranks} rank{'s' if ranks > 1 else ''}"
    return ok(found) if usable >= 2 * ranks else warning(found)


def _allowed_cores(system: System) -> int:
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", system.read("/proc/self/status") or "", re.MULTILINE)
    count = 0
    for part in found.group(1).split(",") if found else []:
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _quota(system: System) -> float:
    """Return the cores that the control group allows, or 0 if it does not limit them."""
    quota, _, period = (system.read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return 0.0 if quota == "max" else int(quota) / int(period)


CHECK = Check(
    name="cores",
    why=(
        "Each rank has a proxy thread that posts writes and polls completions. It wants a core beside "
        "that of the rank itself."
    ),
    fix=(
        "Give the container at least two cores per GPU (`cpu: 96` of a p5en's 192), or start fewer "
        "ranks per host."
    ),
    examine=_examine,
)
