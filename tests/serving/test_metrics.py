"""A real server's /metrics shows what its ranks count, with one API server and with several."""

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm_server import HOST, PROMPTS, Server, serve

from vllm_efa_ep.metrics.registry import RANK_METRICS

FLAGS = [
    *("--enable-expert-parallel", "--data-parallel-size", "2", "--enforce-eager"),
    *("--all2all-backend", "efa_ep_low_latency"),
]


def scrape(server: Server) -> dict[str, dict[tuple[str, ...], float]]:
    """Return our samples by name, then by their labels' values in the order of the labels' names."""
    with urllib.request.urlopen(f"http://{HOST}:{server.port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("efa_ep_"):
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
    assert "vllm:" in text, "vLLM's own metrics are gone"
    return samples


@pytest.mark.parametrize("api_servers", [2, pytest.param(1, marks=pytest.mark.long)])
def test_the_ranks_counters_are_on_metrics(api_servers: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Both ranks, every metric; counters grow with requests; the snapshots go when the server does."""
    environment = {"EFA_EP_RANKS_PER_NODE": "1", "EFA_EP_PROVIDER": "tcp", "TMPDIR": str(tmp_path)}
    flags = [*FLAGS, "--api-server-count", str(api_servers)]
    with serve(models["qwen3_moe"], flags, environment, tmp_path / "server.log") as server:
        server.wait_until_healthy()
        server.complete(PROMPTS[0])
        before = scrape(server)
        assert {name for metric in RANK_METRICS for name in metric.sample_names} <= before.keys()
        assert set(before["efa_ep_rounds_total"]) == {("per_expert", "0"), ("per_expert", "1")}
        server.complete_all()
        after = scrape(server)
        for rank in before["efa_ep_rounds_total"]:
            for name in ("efa_ep_rounds_total", "efa_ep_tokens_total", "efa_ep_writes_total"):
                assert after[name][rank] > before[name][rank], name
            halves = {labels for labels in after["efa_ep_wait_seconds_count"] if labels[1:] == rank}
            assert {half for half, *_ in halves} == {
                *("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
            }
        assert len(list(tmp_path.glob("efa_ep_stats_*/rank*.json"))) == 2
    assert not list(tmp_path.glob("efa_ep_stats_*"))
