"""``gpu-nic-pairing``: has every GPU its own NICs under its own PCIe switch?"""

from vllm_efa_ep.doctor.check import Check, Finding, not_applicable, ok, warning
from vllm_efa_ep.doctor.hardware import efa_rdma_devices, nvidia_gpus
from vllm_efa_ep.doctor.system import System
from vllm_efa_ep.pci_topology import Locality, gpu_affinities


def _examine(system: System) -> Finding:
    if not nvidia_gpus(system) or not efa_rdma_devices(system):
        return not_applicable("needs an NVIDIA GPU and an EFA device with a driver")
    affinities = gpu_affinities(system.path("/sys"))
    counts = sorted({len(affinity.nics) for affinity in affinities})
    shared = len([nic for affinity in affinities for nic in affinity.nics]) - len(
        {nic for affinity in affinities for nic in affinity.nics}
    )
    far = [affinity for affinity in affinities if affinity.locality is not Locality.SWITCH]
    found = f"{len(affinities)} GPUs with {' or '.join(map(str, counts))} NICs each"
    if shared:
        return warning(f"{found}; GPUs share NICs")
    if far:
        return warning(f"{found}; {far[0].gpu} and its NICs share no more than a {far[0].locality.value}")
    if len(counts) > 1:
        return warning(f"{found}: not the same for all")
    return ok(f"{found}, under the same PCIe switch")


CHECK = Check(
    name="gpu-nic-pairing",
    why=(
        "A NIC that is not under its GPU's PCIe switch reads GPU memory through the CPU, at a "
        "fraction of its rate."
    ),
    fix=(
        "Give the container the whole node: all GPUs, all EFA devices and the host's /sys; then set "
        "nothing, since ranks find their NICs themselves. If the instance hides its switches, use one "
        "of p5, p5en, p6-b200 or p6-b300."
    ),
    examine=_examine,
)
