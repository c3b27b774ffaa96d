"""Machines as ``vllm-efa-ep doctor`` sees them: files below a directory, what programs print, and variables.

Reconstructed from public documentation, not recorded on the instances: the PCI trees of ``pci_trees``, the
files that the EFA driver and NVIDIA's driver are documented to show, and the documented output of nvidia-smi.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pci_trees import build, lines_of

from vllm_efa_ep.doctor.system import PROBE, Printed, System

TYPES = {
    "p5": "p5.48xlarge",
    "p5en": "p5en.48xlarge",
    "p6-b200": "p6-b200.48xlarge",
    "p6-b300": "p6-b300.48xlarge",
}
GPUS = 8
FABRIC_STATE = ("nvidia-smi", "--query-gpu=index,fabric.state", "--format=csv,noheader")
PEER_MATRIX = ("nvidia-smi", "topo", "-p2p", "n")
DF = ("df", "--output=size", "--block-size=1", "/dev/shm")
LDCONFIG = ("ldconfig", "-p")


@dataclass
class Machine:
    """A machine that a test may break before it is examined."""

    root: Path
    commands: dict[tuple[str, ...], Printed] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def system(self) -> System:
        """As the checks see it."""
        return System(self.root, self.environment, self.commands.get)

    def write(self, path: str, text: str) -> None:
        """Put a file at an absolute path of the machine."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def remove(self, pattern: str) -> None:
        """Take away all files that match; each must be there."""
        found = list(self.root.glob(pattern.lstrip("/")))
        assert found, f"nothing matches {pattern}"
        for path in found:
            path.unlink()

    def edit(self, pattern: str, change: Callable[[str], str]) -> None:
        """Change the text of all files that match, each of which must change."""
        found = list(self.root.glob(pattern.lstrip("/")))
        assert found, f"nothing matches {pattern}"
        for path in found:
            text = path.read_text()
            assert change(text) != text, f"{path} stays {text}"
            path.write_text(change(text))

    def prints(self, words: tuple[str, ...], text: str, status: int = 0) -> None:
        """Let a program print this."""
        self.commands[words] = Printed(status, text)

    def finds(self, probe: str, **found: Any) -> None:
        """Let a probe find this; a library may have printed before it."""
        self.prints((PROBE, probe), "a library says hello\n" + json.dumps(found))

    def rdma_devices(self) -> list[str]:
        """Return the names of its EFA devices with a driver."""
        return sorted(path.name for path in self.root.glob("sys/bus/pci/devices/*/infiniband/*"))


def good_machine(instance: str, root: Path) -> Machine:
    """Return an instance on which everything is as it should be."""
    machine = Machine(root)
    build(root / "sys", lines_of(instance))
    _kernel(machine, TYPES[instance])
    _efa(machine)
    _nvidia(machine)
    _software(machine)
    return machine


def machine_without_efa(root: Path) -> Machine:
    """Return a machine with neither EFA nor GPUs, as a developer's."""
    machine = Machine(root)
    _kernel(machine, "Standard PC")
    machine.write("/sys/class/dmi/id/sys_vendor", "QEMU")
    _software(machine)
    machine.finds(
        "fabric",
        library="/lib/x86_64-linux-gnu/libfabric.so.1 libfabric 1.17.0",
        provider="net",
        fabric="192.0.2.0/24",
        nics=["eth0"],
    )
    machine.finds("device", package="0.1.0", devices=["cpu"], torch="2.13.0+cpu", cuda_available=False)
    return machine


def _kernel(machine: Machine, product: str) -> None:
    machine.write("/sys/class/dmi/id/sys_vendor", "Amazon EC2")
    machine.write("/sys/class/dmi/id/product_name", product)
    machine.write("/proc/sys/kernel/osrelease", "6.12.55-74.119.amzn2023.x86_64")
    machine.write(
        "/proc/meminfo",
        "MemTotal: 2113494128 kB\nHugePages_Total: 5128\nHugePages_Free: 5128\nHugepagesize: 2048 kB",
    )
    machine.write(
        "/proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max locked memory         unlimited            unlimited            bytes",
    )
    machine.write("/proc/self/status", "CapEff:\t00000000a80425fb\nCpus_allowed_list:\t0-191")
    machine.write("/sys/fs/cgroup/cpu.max", "max 100000")


def _efa(machine: Machine) -> None:
    machine.write("/sys/module/efa/version", "3.3.0g")
    for number, device in enumerate(machine.rdma_devices()):
        machine.write(f"/dev/infiniband/uverbs{number}", "")
        counters = f"/sys/class/infiniband/{device}/ports/1/hw_counters"
        machine.write(f"{counters}/lifespan", "12")
        for name in ("rdma_write_bytes", "rdma_write_recv_bytes", "rdma_write_wrs", "rx_drops"):
            machine.write(f"{counters}/{name}", "0")


def _nvidia(machine: Machine) -> None:
    machine.write(
        "/proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.105.08  Release Build",
    )
    machine.write("/sys/module/gdrdrv/version", "2.5")
    machine.write("/dev/gdrdrv", "")
    machine.prints(LDCONFIG, "\tlibgdrapi.so.2 (libc6,x86-64) => /usr/lib64/libgdrapi.so.2")
    machine.prints(FABRIC_STATE, "\n".join(f"{gpu}, Completed" for gpu in range(GPUS)))
    machine.prints(PEER_MATRIX, peer_matrix())


def peer_matrix(apart: tuple[int, int] | None = None) -> str:
    """Return what ``nvidia-smi topo -p2p n`` prints, with one pair of GPUs that do not reach each other."""
    header = " \t" + "\t".join(f"GPU{gpu}" for gpu in range(GPUS))
    rows = [
        f" GPU{row}\t"
        + "\t".join(
            "X" if row == column else "NS" if {row, column} == set(apart or ()) else "OK"
            for column in range(GPUS)
        )
        for row in range(GPUS)
    ]
    return "\n".join([header, *rows, "", "Legend:", "  X    = Self", "  OK   = Status Ok"])


def _software(machine: Machine) -> None:
    machine.prints(DF, "1B-blocks\n68719476736")
    machine.finds(
        "fabric",
        library="/opt/amazon/efa/lib64/libfabric.so.1 libfabric 2.6.0amzn1.0",
        provider="efa",
        fabric="efa-direct",
        nics=[f"{device}-rdm" for device in machine.rdma_devices()],
    )
    machine.finds(
        "device", package="0.1.0", devices=["cpu", "cuda"], torch="2.13.0+cu130", cuda_available=True
    )
    machine.finds("vllm", version="0.33.0", plugin=True, problems=[])
    machine.finds("local_write", latency_s=20e-6, bytes_per_second=300e9)
