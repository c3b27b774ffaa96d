"""Served over Ray by several hosts, a model answers as in one process; a host that vanishes is named.

Hosts are network namespaces with a Ray node each, so these tests need root.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import ENVIRONMENT, HOST, ROOT, SERVER_FLAGS, read_stats, vllm_command

sys.path.append(str(ROOT / "tests" / "hosts"))

from network import Host, hosts, why_impossible
from programs import DEADLINE_S, HERE, Program
from ray_cluster import RayCluster, ray_cluster

_HOSTS = 4
_PORT = 8000
# Nine processes that import vLLM, on whatever cores this machine has left.
_START_SECONDS = 900
_HOST_TIMEOUT_S = 5
_TIMEOUT_S = 30
# What vLLM and Ray take, after a host has vanished, until the server has ended.
_END_SECONDS = 90


@contextlib.contextmanager
def _serving(cluster: RayCluster, model: Path, directory: Path, backend: str) -> Iterator[Program]:
    """Run ``vllm serve`` with one rank per host; only this process has our settings, vLLM copies them."""
    head = cluster.hosts[0]
    flags = [
        *("--enable-expert-parallel", "--data-parallel-backend", "ray", "--enforce-eager"),
        *("--data-parallel-size", str(_HOSTS), "--data-parallel-size-local", "1", "--api-server-count", "1"),
        *("--all2all-backend", f"efa_ep_{backend}", "--port", str(_PORT)),
    ]
    server_flags = [head.address if flag == HOST else flag for flag in SERVER_FLAGS]
    settings = {
        "EFA_EP_PROVIDER": "tcp",
        "EFA_EP_STATS_DIR": str(directory / "stats"),
        "EFA_EP_TIMEOUT_S": str(_TIMEOUT_S),
        "EFA_EP_HOST_TIMEOUT_S": str(_HOST_TIMEOUT_S),
    }
    command = [vllm_command(), "serve", str(model), *server_flags, *flags]
    with Program(head, command, directory / "server.log", {**cluster.settings, **settings}) as server:
        yield server


def _ask(cluster: RayCluster, log: Path, *arguments: str) -> Program:
    head = cluster.hosts[0]
    command = [sys.executable, str(HERE / "ask.py"), head.address, str(_PORT), *arguments]
    return Program(head, command, log)


def _wait_for_line(log: Path, pattern: str, deadline: float) -> None:
    while not re.search(pattern, log.read_text(errors="replace")):
        assert time.monotonic() < deadline, f"no {pattern!r} in\n{log.read_text(errors='replace')[-8000:]}"
        time.sleep(0.1)


def _rank_on(host: Host, stats: dict[int, dict[str, Any]]) -> int:
    """Return the rank that Ray has put on a host: by the processes there, as Ray has an order of its own."""
    (rank,) = (rank for rank, each in stats.items() if each["pid"] in host.process_ids())
    return rank


def _restart_node(cluster: RayCluster, host: Host, log: Path) -> None:
    """What an operator does with a host that was away: plug it in, end what still runs, ``ray start``."""
    host.mend()
    host.kill_processes()
    cluster.start_node(host)
    with cluster.driver(log, "wait_for_nodes", "", "", str(_HOSTS)) as driver:
        driver.hear("nodes")


@pytest.mark.skipif(bool(why_impossible()), reason=why_impossible())
@pytest.mark.parametrize(
    ("backend", "to_its_end"),
    [("low_latency", False), pytest.param("high_throughput", True, marks=pytest.mark.long)],
)
def test_four_hosts_serve_until_one_vanishes_and_again_after_a_restart(
    backend: str,
    to_its_end: bool,
    models: dict[str, Path],
    references: dict[str, list[list[int]]],
    tmp_path: Path,
) -> None:
    """The last host's link goes down while all ranks are busy; every other rank says who is missing.

    The server ends when Ray has missed the host for long enough, which is waited for in the long form only.
    """
    model, expected = models["qwen3_moe"], references["qwen3_moe"]
    environment = {**ENVIRONMENT, "RAY_DEDUP_LOGS": "0"}
    with hosts(_HOSTS) as machines, ray_cluster(machines, environment) as cluster:
        first, second = tmp_path / "first", tmp_path / "second"
        for directory in (first, second):
            directory.mkdir()
        with (
            _serving(cluster, model, first, backend) as server,
            _ask(cluster, first / "ask.log", "on") as asking,
        ):
            asking.hear("healthy", _START_SECONDS, server)
            assert asking.hear("tokens", of=server) == expected
            stats = read_stats(first / "stats")
            assert sorted(stats) == list(range(_HOSTS))
            for rank in stats.values():
                (counters,) = rank["all_to_alls"]
                assert counters["nodes"] == _HOSTS
                assert counters["network_rows"] > 0
            assert "the ranks meet over RayBootstrap" in (first / "server.log").read_text(errors="replace")
            lost = _rank_on(machines[-1], stats)
            machines[-1].cut()
            deadline = time.monotonic() + DEADLINE_S
            for rank in stats.keys() - {lost}:
                pattern = rf"EFA EP: rank {rank} sees that rank {lost} is gone"
                _wait_for_line(first / "server.log", pattern, deadline)
            assert asking.hear("refused")
            if to_its_end:
                server.process.wait(_END_SECONDS)
        _restart_node(cluster, machines[-1], tmp_path / "nodes.log")
        with _serving(cluster, model, second, backend) as server, _ask(cluster, second / "ask.log") as asking:
            asking.hear("healthy", _START_SECONDS, server)
            assert asking.hear("tokens", of=server) == expected
