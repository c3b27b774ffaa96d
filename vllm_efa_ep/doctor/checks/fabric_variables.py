"""``fabric-variables``: does the environment set something that stops or slows EFA?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok, warning
from vllm_efa_ep.doctor.system import System

# libfabric's EFA provider ends the process when it finds one of these (efa_env_initialize(), since 1.22).
_FATAL = ("FI_EFA_MTU_SIZE", "FI_EFA_TX_IOV_LIMIT", "FI_EFA_RX_IOV_LIMIT")
# The values that cost the most, against fi_efa(7).
_SLOW = {"FI_EFA_USE_DEVICE_RDMA": "0", "FI_EFA_USE_UNSOLICITED_WRITE_RECV": "0", "FI_EFA_TRACK_MR": "1"}


def _examine(system: System) -> Finding:
    environment = system.environment
    fatal = [name for name in _FATAL if name in environment]
    if fatal:
        return failed(f"{', '.join(fatal)} set: libfabric's EFA provider ends the process that has it")
    slow = [f"{name}={value}" for name, value in _SLOW.items() if environment.get(name) == value]
    if slow:
        return warning(f"{', '.join(slow)} set")
    return ok("no variable that stops or slows EFA")


CHECK = Check(
    name="fabric-variables",
    why=(
        "Recipes for older software set FI_EFA_* variables that end the process or make every write "
        "slower today."
    ),
    fix=(
        "`unset FI_EFA_MTU_SIZE FI_EFA_TX_IOV_LIMIT FI_EFA_RX_IOV_LIMIT FI_EFA_USE_DEVICE_RDMA "
        "FI_EFA_USE_UNSOLICITED_WRITE_RECV FI_EFA_TRACK_MR`"
    ),
    examine=_examine,
)
