"""The checks of one machine, one module each."""

from vllm_efa_ep.doctor.check import Check
from vllm_efa_ep.doctor.checks import (
    cores,
    efa_access,
    efa_devices,
    efa_driver,
    fabric_variables,
    fork_safety,
    gdrcopy,
    gpu_device,
    gpu_nic_pairing,
    hugepages,
    hw_counters,
    libfabric,
    local_write,
    memlock,
    nvlink,
    peer_memory,
    provider,
    settings,
    shared_memory,
    vllm,
)

CHECKS: tuple[Check, ...] = (
    efa_devices.CHECK,
    efa_driver.CHECK,
    efa_access.CHECK,
    libfabric.CHECK,
    provider.CHECK,
    fabric_variables.CHECK,
    memlock.CHECK,
    hugepages.CHECK,
    fork_safety.CHECK,
    hw_counters.CHECK,
    gpu_device.CHECK,
    peer_memory.CHECK,
    gdrcopy.CHECK,
    nvlink.CHECK,
    gpu_nic_pairing.CHECK,
    cores.CHECK,
    shared_memory.CHECK,
    settings.CHECK,
    vllm.CHECK,
    local_write.CHECK,
)
"""In the order in which they are reported: what others depend on comes first."""
