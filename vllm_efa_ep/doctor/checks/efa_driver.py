"""``efa-driver``: has the kernel a driver for the EFA devices, and is it new enough?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, efa_rdma_devices, version_tuple
from vllm_efa_ep.doctor.system import System

# https://github.com/amzn/amzn-drivers/blob/master/kernel/linux/efa/RELEASENOTES.md
_RDMA_WRITE = (2, 4)
_UNSOLICITED_WRITE_RECEIVE = (2, 10)


def _examine(system: System) -> Finding:
    devices = efa_devices(system)
    if not devices:
        return not_applicable("no EFA device")
    if not system.exists("/sys/module/efa"):
        return failed("the kernel module efa is not loaded")
    version = system.read("/sys/module/efa/version") or ""
    bound = len(efa_rdma_devices(system))
    facts = {"EFA driver": version or "of the kernel"}
    if bound < len(devices):
        return failed(f"the driver efa {version} serves {bound} of {len(devices)} EFA devices", **facts)
    if not version:
        return warning("the driver efa is the kernel's own, which has no version", **facts)
    if version_tuple(version) < _RDMA_WRITE:
        return failed(f"the driver efa {version} cannot write by RDMA; 2.4 is the first that can", **facts)
    if version_tuple(version) < _UNSOLICITED_WRITE_RECEIVE:
        return warning(
            f"the driver efa {version} spends a posted receive on each arriving immediate; 2.10 is the "
            "first to do without",
            **facts,
        )
    return ok(f"driver efa {version} serves all {bound} EFA devices", **facts)


CHECK = Check(
    name="efa-driver",
    why=(
        "The driver gives the process RDMA writes with immediate data, and since 2.10 their arrival "
        "without posted receives."
    ),
    fix=(
        "On the host: `curl -O https://efa-installer.amazonaws.com/aws-efa-installer-latest.tar.gz && "
        "tar -xf aws-efa-installer-latest.tar.gz && cd aws-efa-installer && sudo ./efa_installer.sh "
        "-y && sudo modprobe efa`; the same version on all nodes."
    ),
    examine=_examine,
)
