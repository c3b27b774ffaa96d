"""What can be wrong with a machine, and which of the doctor's checks must find it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from recorded_machines import DF, FABRIC_STATE, LDCONFIG, PEER_MATRIX, Machine, peer_matrix

from vllm_efa_ep.doctor.check import Status
from vllm_efa_ep.doctor.system import PROBE


@dataclass(frozen=True)
class Trouble:
    """Something wrong with a machine.

    Attributes:
        what: Its name.
        cause: Does it to a p5en.
        check: The check that must find it.
        status: How bad that is.
        says: What the finding must say.
        also: Other checks that it troubles.

    """

    what: str
    cause: Callable[[Machine], object]
    check: str
    status: Status
    says: str
    also: frozenset[str] = frozenset()


def no_efa(machine: Machine) -> None:
    """Launch the instance without EFA interfaces; libfabric then has TCP."""
    for link in machine.root.glob("sys/bus/pci/devices/*"):
        if (link / "device").read_text().startswith("0xefa"):
            link.unlink()
    uses(machine, provider="tcp", fabric="10.0.0.0/16", nics=["ens5"])


def no_driver(machine: Machine) -> None:
    """Take the EFA driver away, and with it the RDMA devices."""
    machine.remove("/sys/module/efa/version")
    (machine.root / "sys/module/efa").rmdir()
    for directory in machine.root.glob("sys/bus/pci/devices/*/infiniband/*"):
        directory.rmdir()
    provider_refuses(machine)


def provider_refuses(machine: Machine) -> None:
    """Let libfabric not find the devices."""
    error = "this machine has EFA devices, but libfabric 2.6.0 cannot use them: efa-direct: -61"
    machine.finds("fabric", error=error)
    machine.finds("local_write", error=error)


def one_nic_less(machine: Machine) -> None:
    """Leave one EFA device out."""
    for link in sorted(machine.root.glob("sys/bus/pci/devices/*")):
        if (link / "device").read_text().startswith("0xefa"):
            link.unlink()
            return


def first_generation(machine: Machine) -> None:
    """Have devices as in p4d."""
    for link in machine.root.glob("sys/bus/pci/devices/*"):
        if (link / "device").read_text().startswith("0xefa"):
            (link / "device").write_text("0xefa0\n")


def uses(machine: Machine, **changes: object) -> None:
    """Change what the network turned out to be."""
    found = {
        "library": "/opt/amazon/efa/lib64/libfabric.so.1 libfabric 2.6.0amzn1.0",
        "provider": "efa",
        "fabric": "efa-direct",
        "nics": machine.rdma_devices(),
    }
    machine.finds("fabric", **{**found, **changes})


def device(machine: Machine, **changes: object) -> None:
    """Change what the probe of torch and this package finds."""
    found = {"package": "0.1.0", "devices": ["cpu", "cuda"], "torch": "2.13.0+cu130", "cuda_available": True}
    machine.finds("device", **{**found, **changes})


def vllm(machine: Machine, **changes: object) -> None:
    """Change what the probe of vLLM finds."""
    machine.finds("vllm", **{"version": "0.33.0", "plugin": True, "problems": [], **changes})


def closed_driver(machine: Machine) -> None:
    """Replace NVIDIA's open kernel modules."""
    machine.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.105.08")


def closed_driver_with_peermem(machine: Machine) -> None:
    """Replace NVIDIA's open kernel modules, and load nvidia-peermem."""
    closed_driver(machine)
    machine.write("/sys/module/nvidia_peermem/version", "580.105.08")


def flat_bus(machine: Machine) -> None:
    """Hide the PCIe switches, as some hypervisors do: every device right below its root bus."""
    links = machine.root / "sys/bus/pci/devices"
    for link in sorted(links.iterdir()):
        target = link.resolve()
        root_bus = next(part for part in target.parts if part.startswith("pci"))
        flat = machine.root / "sys/flat" / root_bus / target.name
        flat.parent.mkdir(parents=True, exist_ok=True)
        target.rename(flat)
        link.unlink()
        link.symlink_to(flat)


def counters_of_a_minute_ago(machine: Machine) -> None:
    """Somebody has told the kernel to ask the devices once a minute."""
    for name in machine.rdma_devices():
        machine.write(f"/sys/class/infiniband/{name}/ports/1/hw_counters/lifespan", "60000")


def empty_secret(machine: Machine) -> None:
    """Forget to fill the file of the run's secret."""
    machine.write("/run/efa-ep/token", "")
    machine.environment.update(EFA_EP_TOKEN_FILE="/run/efa-ep/token")


def no_module(machine: Machine, name: str) -> None:
    """Unload a kernel module."""
    machine.remove(f"/sys/module/{name}/version")
    (machine.root / "sys/module" / name).rmdir()


FAILED, WARNING = Status.FAILED, Status.WARNING
NO_NETWORK = frozenset({"provider", "libfabric", "local-write"})
DEBIAN_LIBRARY = "/usr/lib/x86_64-linux-gnu/libfabric.so.1 libfabric"
COUNTERS = "/sys/class/infiniband/*/ports/1/hw_counters"
TROUBLES = [
    Trouble("no EFA interfaces", no_efa, "efa-devices", FAILED, "it can have 16", frozenset({"provider"})),
    Trouble(
        "one EFA interface too few",
        one_nic_less,
        "efa-devices",
        FAILED,
        "15 EFA devices",
        frozenset({"gpu-nic-pairing"}),
    ),
    Trouble(
        "wrong generation",
        first_generation,
        "efa-devices",
        FAILED,
        "0xefa0 has no RDMA write",
    ),
    Trouble("no driver", no_driver, "efa-driver", FAILED, "efa is not loaded", NO_NETWORK),
    Trouble(
        "driver too old",
        lambda m: m.write("/sys/module/efa/version", "2.1.1g"),
        "efa-driver",
        FAILED,
        "2.1.1g cannot write by RDMA",
    ),
    Trouble(
        "driver without unsolicited receive",
        lambda m: m.write("/sys/module/efa/version", "2.8.0g"),
        "efa-driver",
        WARNING,
        "posted receive",
    ),
    Trouble(
        "no uverbs in the container",
        lambda m: (m.remove("/dev/infiniband/uverbs*"), provider_refuses(m)),
        "efa-access",
        FAILED,
        "can open 0 of 16",
        NO_NETWORK,
    ),
    Trouble(
        "some of the node's EFA devices in the container",
        lambda m: m.remove("/dev/infiniband/uverbs1?"),
        "efa-access",
        WARNING,
        "can open 10 of 16",
    ),
    Trouble(
        "no libfabric",
        lambda m: m.finds(
            "fabric", error="no usable libfabric: libfabric.so.1: cannot open shared object file"
        ),
        "libfabric",
        FAILED,
        "no usable libfabric",
        frozenset({"provider"}),
    ),
    Trouble(
        "libfabric of the distribution, too old",
        lambda m: uses(m, library=f"{DEBIAN_LIBRARY} 1.17.0", fabric="efa"),
        "libfabric",
        FAILED,
        "1.17.0",
        frozenset({"provider"}),
    ),
    Trouble(
        "libfabric without efa-direct",
        lambda m: uses(m, library=f"{DEBIAN_LIBRARY} 1.22.0", fabric="efa"),
        "libfabric",
        WARNING,
        "no fabric efa-direct",
        frozenset({"provider"}),
    ),
    Trouble(
        "libfabric that is not AWS's",
        lambda m: uses(m, library=f"{DEBIAN_LIBRARY} 2.6.0"),
        "libfabric",
        WARNING,
        "not AWS's build",
    ),
    Trouble(
        "TCP although there is EFA",
        lambda m: uses(m, provider="tcp", fabric="10.0.0.0/16", nics=["ens5"]),
        "provider",
        FAILED,
        "would not be used",
    ),
    Trouble(
        "fabric efa", lambda m: uses(m, fabric="efa"), "provider", WARNING, "slower of EFA's two fabrics"
    ),
    Trouble(
        "a fatal variable",
        lambda m: m.environment.update(FI_EFA_MTU_SIZE="8192"),
        "fabric-variables",
        FAILED,
        "FI_EFA_MTU_SIZE",
    ),
    Trouble(
        "a slow variable",
        lambda m: m.environment.update(FI_EFA_USE_DEVICE_RDMA="0"),
        "fabric-variables",
        WARNING,
        "FI_EFA_USE_DEVICE_RDMA=0",
    ),
    Trouble(
        "memlock of a login shell",
        lambda m: m.edit("/proc/self/limits", lambda text: text.replace("unlimited", "8388608  ")),
        "memlock",
        FAILED,
        "may pin 8388608 bytes",
    ),
    Trouble(
        "no huge pages",
        lambda m: m.edit("/proc/meminfo", lambda text: re.sub(r"5128", "0", text)),
        "hugepages",
        WARNING,
        "0 of 0 huge pages",
    ),
    Trouble(
        "all huge pages taken",
        lambda m: m.edit("/proc/meminfo", lambda text: re.sub(r"(Free: +)5128", r"\g<1>0", text)),
        "hugepages",
        WARNING,
        "0 of 5128 huge pages",
    ),
    Trouble(
        "fork switch on a new kernel",
        lambda m: m.environment.update(RDMAV_FORK_SAFE="1"),
        "fork-safety",
        WARNING,
        "RDMAV_FORK_SAFE set",
    ),
    Trouble(
        "kernel without safe forks and without the switch",
        lambda m: m.write("/proc/sys/kernel/osrelease", "5.14.0-570.el9.x86_64"),
        "fork-safety",
        FAILED,
        "FI_EFA_FORK_SAFE is not set",
    ),
    Trouble(
        "no counters",
        lambda m: m.remove(f"{COUNTERS}/rdma_write_bytes"),
        "hw-counters",
        WARNING,
        "rdma_write_bytes",
    ),
    Trouble(
        "counters of a minute ago",
        counters_of_a_minute_ago,
        "hw-counters",
        WARNING,
        "up to 60000 ms ago",
    ),
    Trouble(
        "torch without CUDA",
        lambda m: device(m, cuda_available=False),
        "device",
        FAILED,
        "torch 2.13.0+cu130 cannot",
    ),
    Trouble("package without CUDA", lambda m: device(m, devices=["cpu"]), "device", FAILED, "no CUDA device"),
    Trouble("closed NVIDIA driver", closed_driver, "peer-memory", FAILED, "neither dma-buf"),
    Trouble(
        "nvidia-peermem",
        closed_driver_with_peermem,
        "peer-memory",
        WARNING,
        "nvidia_peermem instead of dma-buf",
    ),
    Trouble(
        "kernel without dma-buf",
        lambda m: m.write("/proc/sys/kernel/osrelease", "5.10.245-241.978.amzn2.x86_64"),
        "peer-memory",
        FAILED,
        "5.10.245-241.978.amzn2.x86_64 has no dma-buf",
        frozenset({"fork-safety"}),
    ),
    Trouble(
        "no NVIDIA driver",
        lambda m: m.remove("/proc/driver/nvidia/version"),
        "peer-memory",
        FAILED,
        "NVIDIA kernel driver is not loaded",
    ),
    Trouble("no gdrdrv", lambda m: no_module(m, "gdrdrv"), "gdrcopy", WARNING, "gdrdrv is not loaded"),
    Trouble(
        "no /dev/gdrdrv", lambda m: m.remove("/dev/gdrdrv"), "gdrcopy", WARNING, "cannot open /dev/gdrdrv"
    ),
    Trouble("no libgdrapi", lambda m: m.prints(LDCONFIG, "libc.so.6"), "gdrcopy", WARNING, "libgdrapi.so.2"),
    Trouble(
        "NVSwitch fabric stuck",
        lambda m: m.prints(FABRIC_STATE, "0, Completed\n1, In Progress"),
        "nvlink",
        FAILED,
        "1, In Progress",
    ),
    Trouble(
        "GPUs without NVLink",
        lambda m: m.prints(PEER_MATRIX, peer_matrix((2, 5))),
        "nvlink",
        FAILED,
        "GPU2, GPU5",
    ),
    Trouble(
        "nvidia-smi fails",
        lambda m: m.prints(PEER_MATRIX, "No devices were found", 6),
        "nvlink",
        FAILED,
        "No devices",
    ),
    Trouble("no nvidia-smi", lambda m: m.commands.pop(PEER_MATRIX), "nvlink", FAILED, "no nvidia-smi"),
    Trouble("hidden PCIe switches", flat_bus, "gpu-nic-pairing", WARNING, "no more than a PCI root bus"),
    Trouble(
        "a few cores",
        lambda m: m.write("/sys/fs/cgroup/cpu.max", "400000 100000"),
        "cores",
        WARNING,
        "may use 4",
    ),
    Trouble(
        "a container's /dev/shm",
        lambda m: m.prints(DF, "1B-blocks\n67108864"),
        "shared-memory",
        WARNING,
        "0.1 GiB",
    ),
    Trouble(
        "no /dev/shm", lambda m: m.prints(DF, "No such file", 1), "shared-memory", WARNING, "not mounted"
    ),
    Trouble(
        "misspelt setting",
        lambda m: m.environment.update(EFA_EP_TIMEOUT="5"),
        "settings",
        FAILED,
        "EFA_EP_TIMEOUT",
    ),
    Trouble(
        "no secret where it should be",
        lambda m: m.environment.update(EFA_EP_TOKEN_FILE="/run/efa-ep/token"),
        "settings",
        FAILED,
        "run/efa-ep/token: No such file or directory",
    ),
    Trouble(
        "an empty secret",
        empty_secret,
        "settings",
        FAILED,
        "holds 0 bytes",
    ),
    Trouble("no vLLM", lambda m: vllm(m, version=None), "vllm", WARNING, "not installed"),
    Trouble(
        "unknown vLLM",
        lambda m: vllm(m, version="0.40.0", problems=["vllm.config.parallel.All2AllBackend does not exist"]),
        "vllm",
        FAILED,
        "0.40.0 differs",
    ),
    Trouble("plugin left out", lambda m: vllm(m, plugin=False), "vllm", FAILED, "VLLM_PLUGINS"),
    Trouble(
        "writes fail",
        lambda m: m.finds("local_write", error="rank 1 did not answer within 20000 ms"),
        "local-write",
        FAILED,
        "did not answer",
    ),
    Trouble(
        "a probe crashes",
        lambda m: m.prints((PROBE, "local_write"), "Segmentation fault", -11),
        "local-write",
        FAILED,
        "Segmentation fault",
    ),
]
