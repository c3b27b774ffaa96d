"""Makes ``efa_ep.json``, the Grafana dashboard of the metrics in docs/metrics.md.

pip install grafana-foundation-sdk
python examples/grafana/dashboard.py > examples/grafana/efa_ep.json
"""

import sys

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WINDOW = "[$__rate_interval]"
RANKS = 'rank=~"$rank", layout=~"$layout"'
HEIGHT = 8
HALF_WIDTH = 12


def rate(metric: str, by: str = "rank") -> str:
    """Return the rate of a counter of the chosen ranks."""
    return f"sum by ({by}) (rate({metric}{{{RANKS}}}{WINDOW}))"


def per_token(metric: str) -> str:
    """Return the rate of a counter divided by the rate of tokens."""
    return f"{rate(metric, 'layout')} / {rate('efa_ep_tokens_total', 'layout')}"


def nic_rate(metric: str) -> str:
    """Return the rate of a counter of the NICs."""
    return f"sum by (instance, device) (rate({metric}{WINDOW}))"


def hourly(metric: str) -> str:
    """Return how much a counter of the NICs has grown in an hour."""
    return f"sum(increase({metric}[1h]))"


def mean(metric: str) -> str:
    """Return the mean of a histogram over the chosen ranks, by half."""
    return f"{rate(f'{metric}_sum', 'half')} / {rate(f'{metric}_count', 'half')}"


def quantile(q: float, metric: str) -> str:
    """Return a quantile of a histogram over the chosen ranks, by half."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le, half')})"


def query(expression: str, legend: str) -> prometheus.Dataquery:
    """Return a query over time."""
    return prometheus.Dataquery().expr(expression).legend_format(legend)


def lines(title: str, unit: str, meaning: str, **queries: str) -> timeseries.Panel:
    """Return a panel of lines; each keyword is a reference and each value ``legend: expression``."""
    panel = timeseries.Panel().title(title).description(meaning).unit(unit).datasource(SOURCE)
    for reference, text in queries.items():
        legend, expression = text.split(": ", 1)
        panel.with_target(query(expression, legend).ref_id(reference))
    return panel.span(HALF_WIDTH).height(HEIGHT)


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    slowest = f'count_values("peer", efa_ep_slowest_peer{{{RANKS}}} >= 0)'
    return (
        dashboard.Dashboard("vLLM: expert parallelism on EFA")
        .uid("vllm-efa-ep")
        .tags(["vllm", "efa"])
        .refresh("10s")
        .time("now-30m", "now")
        .editable()
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(variable("rank"))
        .with_variable(variable("layout"))
        .with_row(dashboard.Row("Rounds"))
        .with_panel(
            lines(
                "Rounds per second",
                "ops",
                "Dispatch + combine rounds, one per MoE layer and step. Ranks run them together.",
                A=f"rank {{{{rank}}}}: {rate('efa_ep_rounds_total')}",
            )
        )
        .with_panel(
            lines(
                "Tokens per second",
                "ops",
                "Tokens that each rank dispatches; idle data-parallel ranks take part with few.",
                A=f"rank {{{{rank}}}}: {rate('efa_ep_tokens_total')}",
            )
        )
        .with_panel(
            lines(
                "Time per half, mean",
                "s",
                "Most of a receive half is waiting for other ranks.",
                A=f"{{{{half}}}}: {mean('efa_ep_half_seconds')}",
            )
        )
        .with_panel(
            lines(
                "Time per half, 99th percentile",
                "s",
                "From buckets that double in width: right within a factor of two.",
                A=f"{{{{half}}}}: {quantile(0.99, 'efa_ep_half_seconds')}",
            )
        )
        .with_row(dashboard.Row("Waiting"))
        .with_panel(
            lines(
                "Waiting per half, mean",
                "s",
                "The part of a half in which a rank could do nothing.",
                A=f"{{{{half}}}}: {mean('efa_ep_wait_seconds')}",
            )
        )
        .with_panel(
            lines(
                "Seconds of waiting per second",
                "percentunit",
                "By rank: the rank that waits least is the one the others wait for.",
                A=f"rank {{{{rank}}}}: {rate('efa_ep_wait_seconds_sum')}",
            )
        )
        .with_panel(
            heatmap.Panel()
            .title("Waiting in combine_recv")
            .description("How waits are distributed: a second band is a straggler.")
            .datasource(SOURCE)
            .with_target(
                query(
                    f'sum by (le) (rate(efa_ep_wait_seconds_bucket{{{RANKS}, half="combine_recv"}}{WINDOW}))',
                    "{{le}}",
                ).format("heatmap")
            )
            .span(HALF_WIDTH)
            .height(HEIGHT)
        )
        .with_panel(
            lines(
                "Slowest peer",
                "short",
                "How many ranks have waited longest for a peer, since their start.",
                A=f"rank {{{{peer}}}}: {slowest}",
            )
        )
        .with_row(dashboard.Row("Lost ranks"))
        .with_panel(
            lines(
                "Live ranks",
                "short",
                "Ranks that take part, as each rank sees it, and how often they had to agree anew.",
                A=f"live: min by (layout) (efa_ep_live_ranks{{{RANKS}}})",
                B=f"generation: max by (layout) (efa_ep_generation{{{RANKS}}})",
            )
        )
        .with_panel(
            lines(
                "Dropped slots per token",
                "short",
                "Choices of experts whose rank is lost, and their router weights.",
                A=f"slots: {per_token('efa_ep_dropped_slots_total')}",
                B=f"weight: {per_token('efa_ep_dropped_weight_total')}",
            )
        )
        .with_row(dashboard.Row("Network"))
        .with_panel(
            lines(
                "Bytes written",
                "Bps",
                "By this package; compare with the NIC's.",
                A=f"rank {{{{rank}}}}: {rate('efa_ep_written_bytes_total')}",
            )
        )
        .with_panel(
            lines(
                "Writes per round",
                "short",
                "Work requests of a rank per round; 2 (N-1) x chunks.",
                A=f"rank {{{{rank}}}}: {rate('efa_ep_writes_total')} / {rate('efa_ep_rounds_total')}",
            )
        )
        .with_panel(
            lines(
                "Rows per second",
                "ops",
                "Sent over the network, offered inside the node, and received for experts.",
                A=f"network: {rate('efa_ep_network_rows_total', 'layout')}",
                B=f"own node: {rate('efa_ep_peer_rows_total', 'layout')}",
                C=f"received: {rate('efa_ep_received_rows_total', 'layout')}",
            )
        )
        .with_panel(
            lines(
                "Refused posts and fence stalls",
                "short",
                "Posts that the fabric refused for the moment (full queue), and time that fences cost.",
                A=f"refused, rank {{{{rank}}}}: {rate('efa_ep_retries_total')}",
                B=f"stalled, rank {{{{rank}}}}: {rate('efa_ep_fence_stall_seconds_total')}",
            )
        )
        .with_row(dashboard.Row("EFA devices (all programs of a host)"))
        .with_panel(
            lines(
                "RDMA write bytes",
                "Bps",
                "Zero while ranks write means that the traffic does not go over EFA.",
                A=f"sent {{{{device}}}}: {nic_rate('efa_ep_nic_write_bytes_total')}",
                B=f"received {{{{device}}}}: {nic_rate('efa_ep_nic_write_received_bytes_total')}",
            )
        )
        .with_panel(
            lines(
                "Retransmissions and drops",
                "pps",
                "Congestion or loss.",
                A=f"sent again {{{{device}}}}: {nic_rate('efa_ep_nic_retransmitted_packets_total')}",
                B=f"dropped {{{{device}}}}: {nic_rate('efa_ep_nic_rx_drops_total')}",
            )
        )
        .with_panel(
            stat.Panel()
            .title("Peers in trouble")
            .description(
                "Events of the last hour: unresponsive remote NICs, impaired connections, failed writes."
            )
            .datasource(SOURCE)
            .with_target(query(hourly("efa_ep_nic_unresponsive_peers_total"), "unresponsive").ref_id("A"))
            .with_target(query(hourly("efa_ep_nic_impaired_connections_total"), "impaired").ref_id("B"))
            .with_target(query(hourly("efa_ep_nic_write_errors_total"), "failed").ref_id("C"))
            .span(HALF_WIDTH)
            .height(HEIGHT)
        )
        .with_panel(
            table.Panel()
            .title("Ranks")
            .description("What each rank runs on.")
            .datasource(SOURCE)
            .with_target(query(f"efa_ep_rank_info{{{RANKS}}}", "").instant().format("table"))
            .span(HALF_WIDTH)
            .height(HEIGHT)
        )
    )


def variable(label: str) -> dashboard.QueryVariable:
    """Return a choice among the values of a label."""
    return (
        dashboard.QueryVariable(label)
        .datasource(SOURCE)
        .query(f"label_values(efa_ep_rounds_total, {label})")
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def main() -> None:
    """Print the dashboard."""
    sys.stdout.write(JSONEncoder(sort_keys=True, indent=1).encode(build().build()) + "\n")


if __name__ == "__main__":
    main()
