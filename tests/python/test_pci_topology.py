"""The NICs and CPUs of a GPU, on the PCI trees of AWS's instances and on trees that hide something."""

from pathlib import Path

import pytest
from pci_trees import INSTANCES, build, lines_of

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.pci_topology import Locality, cpu_list, gpu_affinities, gpu_affinity, normalized

NICS_PER_GPU = {"p5": 4, "p5en": 2, "p6-b200": 1, "p6-b300": 2}


@pytest.mark.parametrize("instance", INSTANCES)
def test_every_gpu_gets_its_switchs_nics_and_no_nic_is_shared(instance: str, tmp_path: Path) -> None:
    """The instances' published numbers: 8 GPUs, each with its NICs under the same switch."""
    affinities = gpu_affinities(build(tmp_path, lines_of(instance)))
    assert len(affinities) == 8
    switch_of = {
        name: line.split()[0].rsplit("/", 2)[0] for line in lines_of(instance) for name in line.split()[5:]
    }
    gpu_switch = {
        line.split()[0].rsplit("/", 1)[1]: line.split()[0].rsplit("/", 2)[0]
        for line in lines_of(instance)
        if " 10de:" in line
    }
    taken = [nic for affinity in affinities for nic in affinity.nics]
    assert len(taken) == len(set(taken)) == 8 * NICS_PER_GPU[instance]
    for number, affinity in enumerate(affinities):
        assert len(affinity.nics) == NICS_PER_GPU[instance]
        assert affinity.locality is Locality.SWITCH
        assert {switch_of[nic] for nic in affinity.nics} == {gpu_switch[affinity.gpu]}
        assert affinity.numa_node == number // 4
        assert affinity.cpus == cpu_list("0-47,96-143" if number < 4 else "48-95,144-191")


def test_published_addresses_of_p5(tmp_path: Path) -> None:
    """What users of p5 see: GPU 0 with rdmap79s0 to rdmap82s0."""
    found = gpu_affinity("0000:53:00.0", build(tmp_path, lines_of("p5")))
    assert found.nics == ("rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0")


@pytest.mark.parametrize("name", ["00000000:CA:00.0", "0000:CA:00.0", " 0000:ca:00.0"])
def test_a_gpu_is_found_by_any_spelling_of_its_address(name: str, tmp_path: Path) -> None:
    """CUDA, NVML and sysfs write addresses differently."""
    assert gpu_affinity(name, build(tmp_path, lines_of("p5"))).gpu == "0000:ca:00.0"


def test_the_order_of_visible_devices_does_not_matter(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES renumbers GPUs: whoever asks by address gets the same answer, in any order."""
    sysfs = build(tmp_path, lines_of("p5en"))
    expected = {affinity.gpu: affinity for affinity in gpu_affinities(sysfs)}
    for visible in (list(expected)[::-1], list(expected)[2:3]):
        assert [gpu_affinity(gpu, sysfs) for gpu in visible] == [expected[gpu] for gpu in visible]


def test_a_gpu_without_nics_under_its_switch_takes_those_of_its_node(tmp_path: Path) -> None:
    """NICs of other GPUs' own switches stay theirs as long as the node has others."""
    up = "pci0000:10/0000:10:00.0/0000:11:00.0"
    sysfs = build(
        tmp_path,
        [
            f"{up}/0000:12:00.0/0000:20:00.0 10de:2330 030200 0 0-3",
            f"{up}/0000:12:01.0/0000:21:00.0 1d0f:efa2 020000 0 0-3 near",
            "pci0000:30/0000:30:00.0/0000:31:00.0/0000:32:00.0/0000:40:00.0 10de:2330 030200 0 0-3",
            "pci0000:50/0000:50:00.0/0000:51:00.0 1d0f:efa2 020000 0 0-3 spare",
            "pci0000:60/0000:60:00.0/0000:61:00.0 1d0f:efa2 020000 1 4-7 far",
        ],
    )
    first, second = gpu_affinities(sysfs)
    assert (first.nics, first.locality) == (("near",), Locality.SWITCH)
    assert (second.nics, second.locality) == (("spare",), Locality.NUMA_NODE)


def test_when_every_nic_has_a_nearer_gpu_they_are_shared(tmp_path: Path) -> None:
    """A GPU must have a NIC, even if that is another GPU's."""
    up = "pci0000:10/0000:10:00.0/0000:11:00.0"
    sysfs = build(
        tmp_path,
        [
            f"{up}/0000:12:00.0/0000:20:00.0 10de:2330 030200 0 0-3",
            f"{up}/0000:12:01.0/0000:21:00.0 1d0f:efa2 020000 0 0-3 near",
            "pci0000:30/0000:30:00.0/0000:40:00.0 10de:2330 030200 1 4-7",
        ],
    )
    assert [affinity.nics for affinity in gpu_affinities(sysfs)] == [("near",), ("near",)]
    assert gpu_affinities(sysfs)[1].locality is Locality.HOST


@pytest.mark.parametrize("numa_node", ["0", "-1"])
def test_a_hypervisor_that_hides_switches(numa_node: str, tmp_path: Path) -> None:
    """On one flat bus the NICs are divided in PCI order, as GPUs and NICs are numbered together."""
    flat = [f"pci0000:00/0000:00:{10 + i:02x}.0 10de:2330 030200 {numa_node} 0-7" for i in range(4)]
    flat += [f"pci0000:00/0000:00:{20 + i:02x}.0 1d0f:efa0 020000 {numa_node} 0-7 efa_{i}" for i in range(8)]
    affinities = gpu_affinities(build(tmp_path, flat))
    assert [affinity.nics for affinity in affinities] == [
        (f"efa_{2 * i}", f"efa_{2 * i + 1}") for i in range(4)
    ]
    assert {affinity.locality for affinity in affinities} == {Locality.ROOT_BUS}
    assert {affinity.numa_node for affinity in affinities} == {None if numa_node == "-1" else 0}


def test_a_flat_bus_over_two_numa_nodes_is_divided_by_node(tmp_path: Path) -> None:
    """The bus says nothing then, but the node still does."""
    flat = [f"pci0000:00/0000:00:{10 + i:02x}.0 10de:2330 030200 {i} 0-7" for i in range(2)]
    flat += [f"pci0000:00/0000:00:{20 + i:02x}.0 1d0f:efa0 020000 {1 - i} 0-7 of_{1 - i}" for i in range(2)]
    assert [affinity.nics for affinity in gpu_affinities(build(tmp_path, flat))] == [("of_0",), ("of_1",)]


def test_fewer_nics_than_gpus(tmp_path: Path) -> None:
    """Eight GPUs on one NIC, as on g5.48xlarge, and on four."""
    for count in (1, 4):
        flat = [f"pci0000:00/0000:00:{10 + i:02x}.0 10de:2237 030200 0 0-7" for i in range(8)]
        flat += [f"pci0000:00/0000:00:{20 + i:02x}.0 1d0f:efa1 020000 0 0-7 efa_{i}" for i in range(count)]
        nics = [affinity.nics for affinity in gpu_affinities(build(tmp_path / str(count), flat))]
        assert nics == [(f"efa_{i * count // 8}",) for i in range(8)]


def test_a_host_without_efa_and_a_nic_without_driver(tmp_path: Path) -> None:
    """Neither is an error here: TCP needs no such NIC."""
    lines = [
        "pci0000:00/0000:00:10.0 10de:2330 030200 0 0-7",
        "pci0000:00/0000:00:11.0 1d0f:efa1 020000 0 0-7",  # no RDMA device
        "pci0000:00/0000:00:12.0 1d0f:ec20 020000 0 0-7",  # ENA
    ]
    (affinity,) = gpu_affinities(build(tmp_path, lines))
    assert affinity.nics == ()
    assert affinity.cpus == frozenset(range(8))


def test_errors_name_what_sysfs_has(tmp_path: Path) -> None:
    """A container without the host's sysfs."""
    sysfs = build(tmp_path, ["pci0000:00/0000:00:10.0 10de:2330 030200 0 0-7"])
    with pytest.raises(ConfigurationError, match=r"0000:99:00.0.*lists 0000:00:10.0; mount"):
        gpu_affinity("0000:99:00.0", sysfs)
    with pytest.raises(ConfigurationError, match="no PCI address"):
        normalized("GPU-1234")
