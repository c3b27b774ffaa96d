"""Every metric, once: name, type, labels, meaning, and where its value comes from.

``docs/metrics.md`` and the collector are made from these tables, and the Grafana dashboard is tested against
them. Nothing here needs prometheus_client.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
RANK_LABELS = ("rank", "layout")
NIC_LABELS = ("device", "port")


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes:
        name: As in a query, but for the suffixes ``_total``, ``_bucket``, ``_sum`` and ``_count``.
        kind: Its Prometheus type.
        source: The field of ``Stats`` it shows, or the file of a NIC's hardware counter.
        meaning: One sentence for ``# HELP`` and the documentation.
        labels: Labels beyond those of its table.
        scale: What a value of the source is multiplied with.

    """

    name: str
    kind: Kind
    source: str
    meaning: str
    labels: tuple[str, ...] = ()
    scale: float = 1

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names under which samples appear."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


def _counter(name: str, source: str, meaning: str, scale: float = 1) -> Metric:
    return Metric(f"efa_ep_{name}", "counter", source, meaning, (), scale)


RANK_METRICS = (
    _counter("rounds", "rounds", "Dispatch + combine rounds that the rank started."),
    _counter("tokens", "tokens", "Tokens that the rank dispatched."),
    _counter("received_rows", "received_rows", "Rows received for the rank's experts."),
    _counter("network_rows", "network_rows", "Rows put on the network, dispatch and combine together."),
    _counter("peer_rows", "peer_rows", "Rows offered to ranks of the own node, itself included."),
    _counter(
        "dropped_slots", "dropped_slots", "Slots of dispatched tokens that named an expert of a lost rank."
    ),
    _counter("dropped_weight", "dropped_weight", "The sum of their router weights."),
    _counter("writes", "writes", "RDMA writes posted."),
    _counter("written_bytes", "bytes_written", "Bytes of those writes."),
    _counter("completions", "completions", "RDMA writes completed."),
    _counter("arrivals", "immediates", "Writes of peers that arrived."),
    _counter("retries", "retries", "Posts that the fabric refused for the moment."),
    _counter("fence_waits", "fence_waits", "Fences that found writes not delivered yet; 0 if `counted`."),
    _counter("fence_stall_seconds", "stall_ns", "Time in which a fence kept the proxy from posting.", 1e-9),
    Metric(
        "efa_ep_half_seconds", "histogram", "half", "Time inside a half, one sample per round.", ("half",)
    ),
    Metric(
        "efa_ep_wait_seconds",
        "histogram",
        "wait",
        "The part of it that was waiting for other ranks.",
        ("half",),
    ),
    Metric(
        "efa_ep_slowest_peer",
        "gauge",
        "slowest_peer",
        "The rank that this one has waited for longest since its start; -1 if it never waited.",
    ),
    Metric(
        "efa_ep_slowest_peer_wait_seconds",
        "gauge",
        "slowest_peer_wait_seconds",
        "How long it has waited for that rank.",
    ),
    Metric("efa_ep_generation", "gauge", "generation", "How often the ranks have agreed on a new mask."),
    Metric("efa_ep_live_ranks", "gauge", "live_ranks", "Ranks that take part."),
    Metric(
        "efa_ep_rank_info",
        "gauge",
        "info",
        "1, with what the rank runs on as labels.",
        ("provider", "fabric", "library", "nodes", "world_size"),
    ),
)
"""Of each rank and layout; two instances of one layout in a rank are added up."""


def _nic(name: str, source: str, meaning: str) -> Metric:
    return Metric(f"efa_ep_nic_{name}", "counter", source, meaning)


NIC_METRICS = (
    _nic("tx_bytes", "tx_bytes", "Bytes sent, of any program."),
    _nic("rx_bytes", "rx_bytes", "Bytes received, of any program."),
    _nic("rx_drops", "rx_drops", "Packets received and dropped."),
    _nic("write_requests", "rdma_write_wrs", "RDMA writes posted."),
    _nic("write_bytes", "rdma_write_bytes", "Bytes of RDMA writes: what proves that traffic goes over EFA."),
    _nic("write_received_bytes", "rdma_write_recv_bytes", "Bytes of RDMA writes of others."),
    _nic("write_errors", "rdma_write_wr_err", "RDMA writes that failed."),
    _nic("retransmitted_bytes", "retrans_bytes", "Bytes sent again: congestion or loss."),
    _nic("retransmitted_packets", "retrans_pkts", "Packets sent again."),
    _nic(
        "retransmission_timeouts", "retrans_timeout_events", "Timeouts that caused packets to be sent again."
    ),
    _nic("unresponsive_peers", "unresponsive_remote_events", "Times a remote NIC did not respond."),
    _nic("impaired_connections", "impaired_remote_conn_events", "Times a connection became impaired."),
)
"""Of each EFA port of the host that serves /metrics, from the driver's hardware counters."""

METRICS = (*RANK_METRICS, *NIC_METRICS)


def metrics_markdown() -> str:
    """Return the table of ``docs/metrics.md``."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = (*(NIC_LABELS if metric in NIC_METRICS else RANK_LABELS), *metric.labels)
        shown = metric.sample_names[0] if metric.kind == "counter" else metric.name
        lines.append(f"| `{shown}` | {metric.kind} | {', '.join(labels)} | {metric.meaning} |")
    return "\n".join(lines) + "\n"
