"""What a host of a run has: devices, NICs, NUMA nodes and versions, as its ranks tell the others."""

import importlib.metadata
import platform
from dataclasses import dataclass, field
from pathlib import Path

from vllm_efa_ep import __version__

_AMAZON, _NVIDIA = "0x1d0f", "0x10de"
_DISPLAY_CONTROLLER = "0x03"
_PACKAGES = ("torch", "ray", "vllm")


@dataclass(frozen=True)
class Inventory:
    """One host.

    Attributes:
        gpus: PCI addresses of its NVIDIA GPUs, visible to this process or not.
        nics: NUMA node (-1: not told) of each EFA device by name.
        efa_generations: PCI device ids of its EFA devices, one per generation: ``0xefa0`` and up.
        numa_nodes: Number of NUMA nodes.
        versions: Of what has to be the same on all hosts.

    """

    gpus: tuple[str, ...] = ()
    nics: dict[str, int] = field(default_factory=dict)
    efa_generations: tuple[str, ...] = ()
    numa_nodes: int = 1
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Describe the devices for people."""
        efa = f"{len(self.nics)} EFA NICs ({', '.join(self.efa_generations)})" if self.nics else "no EFA"
        return f"{len(self.gpus)} GPUs, {efa}, {self.numa_nodes} NUMA node(s)"


def take_inventory(sysfs: Path = Path("/sys")) -> Inventory:
    """Return the inventory of this host; ``sysfs`` is where its sysfs is mounted."""
    gpus = sorted(
        device.name
        for device in (sysfs / "bus/pci/devices").glob("*")
        if _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY_CONTROLLER)
    )
    efa = {
        device.name: device / "device"
        for device in sorted((sysfs / "class/infiniband").glob("*"))
        if _text(device / "device/vendor") == _AMAZON
    }
    return Inventory(
        gpus=tuple(gpus),
        nics={name: int(_text(device / "numa_node") or -1) for name, device in efa.items()},
        efa_generations=tuple(sorted({_text(device / "device") for device in efa.values()})),
        numa_nodes=max(1, len(list((sysfs / "devices/system/node").glob("node[0-9]*")))),
        versions=_versions(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some devices do not have the attribute, others are being removed
        return ""


def _versions() -> dict[str, str]:
    versions = {"vllm_efa_ep": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions
