"""A real server's /metrics shows what its ranks count, with several API servers, too."""

from pathlib import Path

import pytest
from vllm_server import PROMPTS, serve

from vllm_efa_ep.metrics.registry import RANK_METRICS

FLAGS = [
    *("--enable-expert-parallel", "--data-parallel-size", "2", "--enforce-eager"),
    *("--all2all-backend", "efa_ep_low_latency"),
]


@pytest.mark.long
@pytest.mark.parametrize("api_servers", [1, 2])
def test_the_ranks_counters_are_on_metrics(api_servers: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Both ranks, every metric; counters grow with requests; the snapshots go when the server does."""
    environment = {"EFA_EP_RANKS_PER_NODE": "1", "EFA_EP_PROVIDER": "tcp", "TMPDIR": str(tmp_path)}
    flags = [*FLAGS, "--api-server-count", str(api_servers)]
    with serve(models["qwen3_moe"], flags, environment, tmp_path / "server.log") as server:
        server.wait_until_healthy()
        server.complete(PROMPTS[0])
        before = server.metrics()
        assert {name for metric in RANK_METRICS for name in metric.sample_names} <= before.keys()
        assert set(before["efa_ep_rounds_total"]) == {("per_expert", "0"), ("per_expert", "1")}
        server.complete_all()
        after = server.metrics()
        for rank in before["efa_ep_rounds_total"]:
            for name in ("efa_ep_rounds_total", "efa_ep_tokens_total", "efa_ep_writes_total"):
                assert after[name][rank] > before[name][rank], name
        halves = {half for half, *_ in after["efa_ep_wait_seconds_count"]}
        assert halves == {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv"}
    assert not list(tmp_path.glob("efa_ep_stats_*"))
