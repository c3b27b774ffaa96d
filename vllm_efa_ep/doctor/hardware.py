"""The devices that several checks ask about."""

import re
from dataclasses import dataclass

from vllm_efa_ep.doctor.system import System

_PCI = "/sys/bus/pci/devices"
_AMAZON = "0x1d0f"
_NVIDIA = "0x10de"
_EFA = re.compile(r"0xefa[0-9a-f]")


@dataclass(frozen=True)
class PciDevice:
    """A device on the PCI bus.

    Attributes:
        address: Such as ``0000:4f:00.0``.
        device_id: Such as ``0xefa1``.

    """

    address: str
    device_id: str


def efa_devices(system: System) -> list[PciDevice]:
    """Return the EFA devices on the PCI bus, with or without a driver."""
    return [device for device in _devices(system, _AMAZON) if _EFA.fullmatch(device.device_id)]


def meant_instead_of_efa(system: System) -> str:
    """Return the setting that asks for TCP; empty without one, and on a machine that has EFA devices."""
    asked = system.environment.get("EFA_EP_PROVIDER", "")
    return f"EFA_EP_PROVIDER={asked}" if asked in ("tcp", "net") and not efa_devices(system) else ""


def nvidia_gpus(system: System) -> list[PciDevice]:
    """Return the NVIDIA GPUs on the PCI bus, with or without a driver."""
    display = "0x03"
    return [
        device
        for device in _devices(system, _NVIDIA)
        if (system.read(f"{_PCI}/{device.address}/class") or "").startswith(display)
    ]


def efa_rdma_devices(system: System) -> list[str]:
    """Return the RDMA devices that the EFA driver made, such as ``rdmap79s0``."""
    return [
        name for device in efa_devices(system) for name in system.names(f"{_PCI}/{device.address}/infiniband")
    ]


def _devices(system: System, vendor: str) -> list[PciDevice]:
    return [
        PciDevice(address, system.read(f"{_PCI}/{address}/device") or "")
        for address in system.names(_PCI)
        if system.read(f"{_PCI}/{address}/vendor") == vendor
    ]


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``2.17.3g`` is (2, 17, 3), ``6.18.44-fc`` is (6, 18, 44)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def kernel_version(system: System) -> str:
    """Return the release of the running kernel."""
    return system.read("/proc/sys/kernel/osrelease") or ""
