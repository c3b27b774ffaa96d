"""The Prometheus collector: at each scrape, reads the ranks' snapshots and the NICs' counters."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from vllm_efa_ep.metrics.nic_counters import SYSFS, read_nic_counters
from vllm_efa_ep.metrics.registry import NIC_LABELS, NIC_METRICS, RANK_LABELS, RANK_METRICS, Metric

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Snapshot = dict[str, Any]
logger = logging.getLogger(__name__)


class RankCollector(Collector):
    """Every metric of the registry that has a value."""

    def __init__(self, directory: Path, sysfs: Path = SYSFS) -> None:
        """Read ``rank*.json`` of ``directory``, and the NICs below ``sysfs``."""
        self._directory = directory
        self._sysfs = sysfs

    def describe(self) -> Iterator[Family]:
        """Name the metrics without reading anything."""
        yield from (_family(metric) for metric in (*RANK_METRICS, *NIC_METRICS))

    def collect(self) -> Iterator[Family]:
        """Return all samples; called at each scrape."""
        instances = _by_labels(self._snapshots())
        for metric in RANK_METRICS:
            family = _family(metric)
            for instance in instances:
                _add(family, metric, instance)
            yield family
        nics = {each: CounterMetricFamily(each.name, each.meaning, labels=NIC_LABELS) for each in NIC_METRICS}
        for reading in read_nic_counters(self._sysfs):
            nics[reading.metric].add_metric([reading.device, reading.port], reading.value)
        yield from nics.values()

    def _snapshots(self) -> Iterator[Snapshot]:
        for path in sorted(self._directory.glob("rank*.json")):
            try:
                yield json.loads(path.read_text())
            except (OSError, ValueError) as error:  # gone since, or somebody else's: the others count
                logger.warning("EFA EP: /metrics goes without %s: %s", path, error)


def _family(metric: Metric) -> Family:
    labels = (*(NIC_LABELS if metric in NIC_METRICS else RANK_LABELS), *metric.labels)
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family: Family = kinds[metric.kind](metric.name, metric.meaning, labels=labels)
    return family


def _by_labels(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Add up what has the same rank and layout, so that no two samples have equal labels.

    That are instances of one rank, and the ranks of a pipeline's stages, each of which counts from 0.
    """
    groups: dict[tuple[int, str], list[Snapshot]] = defaultdict(list)
    for snapshot in snapshots:
        for instance in snapshot["all_to_alls"]:
            bounds = [*snapshot["duration_bounds"], float("inf")]
            groups[snapshot["rank"], instance["layout"]].append({**instance, "bounds": bounds})
    return [_merged(rank, layout, group) for (rank, layout), group in groups.items()]


def _merged(rank: int, layout: str, group: list[Snapshot]) -> Snapshot:
    waited_for = _sum([each["waited_for_seconds"] for each in group])
    longest = max(waited_for, default=0)
    return {
        **_sum(group),
        **{name: group[0][name] for name in ("generation", "live_ranks", "bounds")},
        "rank": rank,
        "layout": layout,
        "slowest_peer": waited_for.index(longest) if longest > 0 else -1,
        "slowest_peer_wait_seconds": longest,
        "info": [group[0][name] for name in ("provider", "fabric", "library", "nodes", "world_size")],
    }


def _sum(values: list[Any]) -> Any:
    """Add up equal structures number by number; of anything else keep the first."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _sum([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [_sum(list(column)) for column in zip(*values, strict=True)]
    if isinstance(first, int | float) and not isinstance(first, bool):
        return sum(values)
    return first


def _add(family: Family, metric: Metric, instance: Snapshot) -> None:
    labels = [str(instance["rank"]), instance["layout"]]
    if isinstance(family, HistogramMetricFamily):
        for half, counts in instance[f"{metric.source}_buckets"].items():
            seconds = instance[f"{metric.source}_seconds"][half]
            family.add_metric([*labels, half], _cumulative(instance["bounds"], counts), seconds)
    elif metric.source == "info":
        family.add_metric([*labels, *map(str, instance["info"])], 1)
    else:
        family.add_metric(labels, instance[metric.source] * metric.scale)


def _cumulative(bounds: list[float], counts: list[int]) -> list[tuple[str, float]]:
    buckets, total = [], 0
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:.9g}", float(total)))
    return buckets
