"""The Prometheus collector: at each scrape, reads the ranks' snapshots and the NICs' counters."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from vllm_efa_ep.metrics.nic_counters import SYSFS, read_nic_counters
from vllm_efa_ep.metrics.registry import NIC_LABELS, NIC_METRICS, RANK_LABELS, RANK_METRICS, Metric

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Snapshot = dict[str, Any]


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
        snapshots = [json.loads(path.read_text()) for path in sorted(self._directory.glob("rank*.json"))]
        instances = [merged for snapshot in snapshots for merged in _by_layout(snapshot)]
        for metric in RANK_METRICS:
            family = _family(metric)
            for instance in instances:
                _add(family, metric, instance)
            yield family
        nics = {each: CounterMetricFamily(each.name, each.meaning, labels=NIC_LABELS) for each in NIC_METRICS}
        for reading in read_nic_counters(self._sysfs):
            nics[reading.metric].add_metric([reading.device, reading.port], reading.value)
        yield from nics.values()


def _family(metric: Metric) -> Family:
    labels = (*(NIC_LABELS if metric in NIC_METRICS else RANK_LABELS), *metric.labels)
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family: Family = kinds[metric.kind](metric.name, metric.meaning, labels=labels)
    return family


def _by_layout(snapshot: Snapshot) -> Iterator[Snapshot]:
    """Add up the instances of a rank that have the same layout, so that no two samples have equal labels."""
    groups: dict[str, list[Snapshot]] = defaultdict(list)
    for instance in snapshot["all_to_alls"]:
        groups[instance["layout"]].append(instance)
    for layout, group in groups.items():
        waited_for = _sum([each["waited_for_seconds"] for each in group])
        longest = max(waited_for, default=0)
        yield {
            **_sum(group),
            **{name: group[0][name] for name in ("generation", "live_ranks")},
            "rank": snapshot["rank"],
            "layout": layout,
            "bounds": [*snapshot["duration_bounds"], float("inf")],
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
