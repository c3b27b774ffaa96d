"""``fork-safety``: may a process with registered memory fork, and is nothing set against it that hurts?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, kernel_version, version_tuple
from vllm_efa_ep.doctor.system import System

# Since then fork() copies pinned pages for the child, so that the parent's stay registered.
_COPIES_PINNED_PAGES = (5, 15)
_VARIABLES = ("FI_EFA_FORK_SAFE", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE")


def _examine(system: System) -> Finding:
    if not efa_devices(system):
        return not_applicable("no EFA device")
    kernel = kernel_version(system)
    on = [name for name in _VARIABLES if system.environment.get(name, "0") not in ("", "0")]
    if version_tuple(kernel) >= _COPIES_PINNED_PAGES:
        if on:
            return warning(
                f"{', '.join(on)} set, which kernel {kernel} does not need and which turns huge pages off"
            )
        return ok(f"kernel {kernel} makes forking safe")
    if "FI_EFA_FORK_SAFE" in on:
        return ok(f"FI_EFA_FORK_SAFE is set, as kernel {kernel} needs")
    return failed(f"kernel {kernel} does not make forking safe, and FI_EFA_FORK_SAFE is not set")


CHECK = Check(
    name="fork-safety",
    why=(
        "Python and Ray fork. Before Linux 5.15 a fork could leave the NIC writing into pages that "
        "the process no longer has; since then the switches against that only cost huge pages."
    ),
    fix=(
        "Linux 5.15 or newer: `unset FI_EFA_FORK_SAFE RDMAV_FORK_SAFE IBV_FORK_SAFE`. Older: `export "
        "FI_EFA_FORK_SAFE=1`."
    ),
    examine=_examine,
)
