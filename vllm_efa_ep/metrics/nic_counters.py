"""The hardware counters of EFA devices, as the driver shows them in sysfs.

Their names are those of the driver's ``efa_verbs.c``. A file that the driver does not have yet is left out,
and so is one that cannot be read, as while a device is reset: the other metrics are shown all the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vllm_efa_ep.metrics.registry import NIC_METRICS, Metric

SYSFS = Path("/sys/class/infiniband")


class Reading(NamedTuple):
    """One counter of one port."""

    metric: Metric
    device: str
    port: str
    value: int


def read_nic_counters(root: Path = SYSFS) -> Iterator[Reading]:
    """Yield every counter of every EFA port under ``root``."""
    for directory in sorted(root.glob("*/ports/*/hw_counters")):
        port, device = directory.parent, directory.parents[2]
        if not is_efa(device):
            continue
        for metric in NIC_METRICS:
            try:
                value = int((directory / metric.source).read_text())
            except OSError:
                continue
            yield Reading(metric, device.name, port.name, value)


def is_efa(device: Path) -> bool:
    """Return whether a device of /sys/class/infiniband is driven by efa.ko."""
    driver = device / "device" / "driver"
    return driver.exists() and driver.resolve().name == "efa"
