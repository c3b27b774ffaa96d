"""PCI trees of hosts, one text file each, and how to make a sysfs of one.

A line is a device; its fields are named by the last comment of each file.
"""

from pathlib import Path

INSTANCES = ("p5", "p5en", "p6-b200", "p6-b300")


def lines_of(instance: str) -> list[str]:
    """Return the devices of ``<instance>.txt``."""
    text = (Path(__file__).parent / f"{instance}.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def build(sysfs: Path, lines: list[str]) -> Path:
    """Create what the kernel shows of these devices below ``sysfs``, and return it."""
    links = sysfs / "bus/pci/devices"
    links.mkdir(parents=True)
    for line in lines:
        path, identity, device_class, numa_node, cpus, *rdma_device = line.split()
        vendor, product = identity.split(":")
        device = sysfs / "devices" / path
        device.mkdir(parents=True)
        for name, text in {
            "vendor": f"0x{vendor}",
            "device": f"0x{product}",
            "class": f"0x{device_class}",
            "numa_node": numa_node,
            "local_cpulist": cpus,
        }.items():
            (device / name).write_text(text + "\n")
        for name in rdma_device:
            (device / "infiniband" / name).mkdir(parents=True)
        (links / device.name).symlink_to(device)
    return sysfs
