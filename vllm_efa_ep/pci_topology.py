"""Which EFA NICs and which CPUs are near a GPU, as the kernel describes the PCI bus in sysfs.

A NIC reaches a GPU under the same PCIe switch without crossing the CPU. On AWS's instances such a switch
holds one GPU with 4 NICs (p5), or two GPUs with 4 (p5en) or 2 (p6-b200) NICs between them. Where a hypervisor
hides the switches, the root bus, then the NUMA node, then the host takes their place.
"""

import enum
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_efa_ep.errors import ConfigurationError

_AMAZON, _NVIDIA = 0x1D0F, 0x10DE
_DISPLAY_CONTROLLER = 0x03  # GPUs; NVSwitches are bridges


class Locality(enum.Enum):
    """What a GPU and its NICs have in common."""

    SWITCH = "PCIe switch"
    ROOT_BUS = "PCI root bus"
    NUMA_NODE = "NUMA node"
    HOST = "host"


@dataclass(frozen=True)
class GpuAffinity:
    """What is near a GPU.

    Attributes:
        gpu: Its PCI address, ``0000:53:00.0``.
        nics: Its share of the NICs nearest to it, by the names of their RDMA devices (``rdmap79s0``), in PCI
            order. GPUs with equal claims divide them; where NICs are fewer than GPUs, several share one.
            Empty on a host without EFA.
        locality: What it shares with them.
        numa_node: Its NUMA node, or None if the system does not say.
        cpus: The CPUs of that node.

    """

    gpu: str
    nics: tuple[str, ...]
    locality: Locality
    numa_node: int | None
    cpus: frozenset[int]


@dataclass(frozen=True)
class _Device:
    path: tuple[str, ...]  # root bus, bridges, the device itself
    numa_node: int | None
    cpus: frozenset[int]
    rdma_device: str = ""

    @property
    def address(self) -> str:
        return self.path[-1]


def gpu_affinities(sysfs: Path = Path("/sys")) -> tuple[GpuAffinity, ...]:
    """Return the affinity of every NVIDIA GPU of the host, visible to this process or not, in PCI order."""
    gpus, nics = _read_devices(sysfs)
    found: dict[str, GpuAffinity] = {}
    free = list(nics)
    for locality, key in _nearest_first(gpus):
        open_gpus = [gpu for gpu in gpus if gpu.address not in found]
        for place in sorted({key(gpu) for gpu in open_gpus} - {None}, key=str):
            here = [gpu for gpu in open_gpus if key(gpu) == place]
            all_near = [nic for nic in nics if key(nic) == place]
            # NICs under another GPU's own switch are that GPU's, unless nothing else is left.
            near = [nic for nic in free if nic in all_near] or all_near
            if not near:
                continue
            for number, gpu in enumerate(here):
                share = _share(near, number, len(here))
                names = tuple(nic.rdma_device for nic in share)
                found[gpu.address] = GpuAffinity(gpu.address, names, locality, gpu.numa_node, gpu.cpus)
            free = [nic for nic in free if nic not in near]
    for gpu in gpus:
        found.setdefault(gpu.address, GpuAffinity(gpu.address, (), Locality.HOST, gpu.numa_node, gpu.cpus))
    return tuple(found[gpu.address] for gpu in gpus)


def gpu_affinity(bus_id: str, sysfs: Path = Path("/sys")) -> GpuAffinity:
    """Return the affinity of one GPU.

    Args:
        bus_id: Its PCI address as CUDA, NVML or sysfs write it. Not its CUDA ordinal, which depends on
            ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.
        sysfs: Where sysfs is mounted.

    Raises:
        ConfigurationError: sysfs lists no such GPU.

    """
    wanted = normalized(bus_id)
    affinities = gpu_affinities(sysfs)
    for affinity in affinities:
        if affinity.gpu == wanted:
            return affinity
    listed = ", ".join(affinity.gpu for affinity in affinities) or "none"
    raise ConfigurationError(
        f"CUDA names a GPU at PCI address {wanted}, but {sysfs}/bus/pci/devices lists {listed}; mount the "
        "host's sysfs into the container"
    )


def normalized(bus_id: str) -> str:
    """Return a PCI address as sysfs writes it, ``0000:53:00.0``; NVML writes eight digits of domain.

    Raises:
        ConfigurationError: It is no PCI address.

    """
    try:
        domain, bus, rest = bus_id.strip().split(":")
        device, function = rest.split(".")
        return f"{int(domain, 16):04x}:{int(bus, 16):02x}:{int(device, 16):02x}.{int(function, 16):x}"
    except ValueError:
        raise ConfigurationError(f"{bus_id!r} is no PCI address; pass one like 0000:53:00.0") from None


_Key = Callable[[_Device], Hashable]


def _nearest_first(gpus: list[_Device]) -> Iterable[tuple[Locality, _Key]]:
    """Return what devices can have in common, the closest first."""

    def bridge(depth: int) -> _Key:
        return lambda device: device.path[: depth + 1] if len(device.path) > depth + 1 else None

    deepest = max((len(gpu.path) for gpu in gpus), default=0) - 2
    for depth in range(deepest, 0, -1):
        yield Locality.SWITCH, bridge(depth)
    # A root bus that spans NUMA nodes is a hypervisor's invention, so the node counts as well.
    yield Locality.ROOT_BUS, lambda device: (device.path[0], device.numa_node)
    yield Locality.NUMA_NODE, lambda device: device.numa_node
    yield Locality.HOST, lambda _: "host"


def _share(nics: list[_Device], number: int, sharers: int) -> list[_Device]:
    first = number * len(nics) // sharers
    return nics[first : max(first + 1, (number + 1) * len(nics) // sharers)]


def _read_devices(sysfs: Path) -> tuple[list[_Device], list[_Device]]:
    """Return the host's GPUs and EFA NICs, each in PCI order."""
    gpus, nics = [], []
    for link in sorted((sysfs / "bus/pci/devices").glob("*")):
        vendor = _hexadecimal(link / "vendor")
        if vendor == _NVIDIA and _hexadecimal(link / "class") >> 16 == _DISPLAY_CONTROLLER:
            gpus.append(_read_device(link))
        elif vendor == _AMAZON:
            # An EFA is an Amazon device with an RDMA device; an ENA has none, nor has an EFA without driver.
            nics += [_read_device(link, rdma.name) for rdma in sorted((link / "infiniband").glob("*"))]
    return gpus, nics


def _read_device(link: Path, rdma_device: str = "") -> _Device:
    parts = link.resolve().parts
    root = next(number for number, part in enumerate(parts) if part.startswith("pci"))
    numa_node = int((link / "numa_node").read_text())
    return _Device(
        parts[root:],
        None if numa_node < 0 else numa_node,
        cpu_list((link / "local_cpulist").read_text()),
        rdma_device,
    )


def cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format, ``0-47,96-143``."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _hexadecimal(path: Path) -> int:
    return int(path.read_text(), 16)
