"""Ranks on the nodes of a real Ray cluster, one node per host."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import hosts
from programs import DEADLINE_S, Program, environment_on
from ray_cluster import RayCluster, ray_cluster

from vllm_efa_ep.bootstrap.run import Run


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def cluster(request: pytest.FixtureRequest) -> Iterator[RayCluster]:
    """Hosts with Ray on each."""
    with hosts(request.param) as machines, ray_cluster(machines, {"EFA_EP_PROVIDER": "tcp"}) as running:
        yield running


def test_rounds_on_hosts(cluster: RayCluster, tmp_path: Path) -> None:
    """One rank per host, in the order of the hosts; and a rank that dies at the start is named."""
    count = len(cluster.hosts)
    with cluster.driver(tmp_path / "log", "play", "", "", str(count)) as driver:
        assert sorted(driver.hear("hosts")) == [host.address for host in cluster.hosts]
        results = driver.hear("result")
        assert [each["rank"] for each in results] == list(range(count))
        assert len({each["namespace"] for each in results}) == count
        assert all(each["nodes"] == count and each["network_rows"] > 0 for each in results)
        assert "rank 1" in driver.hear("error")


def test_ranks_outlive_their_driver_and_strangers(cluster: RayCluster, tmp_path: Path) -> None:
    """The driver is killed while the ranks start; the next one finds them and gets what they computed.

    In between a stranger tries every door of the run.
    """
    run = Run.new()
    arguments = (run.name, run.token.hex(), "2")
    with cluster.driver(tmp_path / "first.log", "start", *arguments) as first:
        assert first.hear("started")
    with cluster.driver(tmp_path / "second.log", "restart", *arguments) as second:
        refused = second.hear("refused")
        assert sorted(refused) == sorted(
            ["gather", "publish", "publish_once", "lookup", "join", "leave", "connection", "result"]
        )
        assert "pass the run's token" in refused.pop("result")
        assert "refuses this process: it is not a member" in refused.pop("connection")
        for message in refused.values():
            assert f"a stranger is not a member of run {run.name}" in message
        results = second.hear("result")
    winners = {each["winner"] for each in results}
    assert len(winners) == 1
    assert winners <= {"0", "1"}
    for each in results:
        assert each["keys"] == ["0", "1"]
        assert each["network_rows"] > 0


def test_a_rank_is_succeeded_as_soon_as_it_has_ended(cluster: RayCluster, tmp_path: Path) -> None:
    """Killed, it says nothing; its connection does, long before its host would be missed."""
    run = Run.new()

    def join(rank: int, log: str) -> Program:
        return cluster.driver(tmp_path / log, "join", run.name, run.token.hex(), str(rank))

    with join(1, "other.log") as other, join(0, "first.log") as first:
        assert (other.hear("joined"), first.hear("joined")) == (1, 0)
        first.process.kill()
        with join(0, "second.log") as second:
            assert second.hear("joined") == 0


def bench_on(
    cluster: RayCluster, tmp_path: Path, *options: str, **settings: str
) -> "subprocess.CompletedProcess[str]":
    """Run ``vllm-efa-ep bench --ray`` on the head of a cluster, with more settings than the cluster's."""
    cell = ("--tokens", "3", "--hidden", "256", "--experts", "16", "--iterations", "2", "--warm-up", "1")
    command = ["vllm-efa-ep", "bench", "--ray", *cell, "--out", str(tmp_path), *options]
    head = cluster.hosts[0]
    return subprocess.run(
        head.command(command),
        env=environment_on(head, cluster.settings | settings),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_benchmark_on_hosts(cluster: RayCluster, tmp_path: Path) -> None:
    """One rank per host is measured over the network between them; a rank's error ends the command."""
    count = len(cluster.hosts)
    measured = bench_on(
        cluster, tmp_path, "--ranks", str(count), "--against", "ordinary-tensors,gloo-agrs,gloo-a2a"
    )
    assert measured.returncode == 0, measured.stderr
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert (result["cell"]["world"], result["start"]) == (count, 0)
    assert result["barrier"] == "bootstrap"
    assert list(result["contestants"]) == ["ours", "ours_elsewhere", "gloo_allgather", "gloo_alltoall"]
    ours = result["contestants"]["ours"]
    assert len(ours["rounds_us"]) == 2
    assert ours["per_round"]["bytes_written"] >= result["wire_floor_bytes"] > 0
    assert ours["environment"]["provider"] in ("tcp", "net")  # net: tcp of libfabric 1

    failed = bench_on(cluster, tmp_path / "failed", "--ranks", "2", EFA_EP_INTERFACE="nonesuch")
    assert failed.returncode == 2
    assert "vllm-efa-ep: rank" in failed.stderr
    assert "nonesuch" in failed.stderr
    assert not (tmp_path / "failed").exists()
