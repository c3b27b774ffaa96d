"""What a host is found to have, from a system tree made here."""

from pathlib import Path

import pytest

from vllm_efa_ep.bootstrap.inventory import take_inventory


def _device(directory: Path, **attributes: str) -> None:
    directory.mkdir(parents=True)
    for name, value in attributes.items():
        (directory / name.replace("pci_class", "class")).write_text(f"{value}\n")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two GPUs and an NVSwitch, two EFA devices beside somebody else's RDMA device, two NUMA nodes."""
    pci = tmp_path / "bus/pci/devices"
    _device(pci / "0000:53:00.0", vendor="0x10de", pci_class="0x030200")
    _device(pci / "0000:64:00.0", vendor="0x10de", pci_class="0x030200")
    _device(pci / "0000:05:00.0", vendor="0x10de", pci_class="0x068000")
    infiniband = tmp_path / "class/infiniband"
    for name, node in (("rdmap79s0", "0"), ("rdmap80s0", "1")):
        _device(infiniband / name / "device", vendor="0x1d0f", device="0xefa2", numa_node=node)
    _device(infiniband / "mlx5_0/device", vendor="0x15b3", device="0x1021", numa_node="0")
    for node in range(2):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
    return tmp_path


def test_devices_are_found(sysfs: Path) -> None:
    """By vendor and class, not by name."""
    found = take_inventory(sysfs)
    assert found.gpus == ("0000:53:00.0", "0000:64:00.0")
    assert found.nics == {"rdmap79s0": 0, "rdmap80s0": 1}
    assert found.efa_generations == ("0xefa2",)
    assert found.numa_nodes == 2
    assert str(found) == "2 GPUs, 2 EFA NICs (0xefa2), 2 NUMA node(s)"


def test_a_machine_without_devices(tmp_path: Path) -> None:
    """An empty tree, as in a small virtual machine."""
    found = take_inventory(tmp_path)
    assert (found.gpus, found.nics, found.numa_nodes) == ((), {}, 1)
    assert str(found) == "0 GPUs, no EFA, 1 NUMA node(s)"
    assert {"vllm_efa_ep", "torch", "python"} <= found.versions.keys()
