"""``vllm-efa-ep doctor --ray`` on the nodes of a real Ray cluster, whose data network is not Ray's own.

As on EFA instances, where Ray and ssh work however wrong the security group of the EFA devices is.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from network import DATA_INTERFACE, INTERFACE, Host, hosts
from programs import DEADLINE_S, environment_on
from ray_cluster import RayCluster, ray_cluster

_SETTINGS = {"EFA_EP_PROVIDER": "tcp", "EFA_EP_INTERFACE": DATA_INTERFACE}
_INTERFACES = (INTERFACE, DATA_INTERFACE)


def _examine(cluster: RayCluster, status: int) -> dict[str, Any]:
    """Run the command on the first host and return its report."""
    head = cluster.hosts[0]
    ended = subprocess.run(
        head.command(["vllm-efa-ep", "doctor", "--ray", "--json"]),
        env=environment_on(head, cluster.settings),
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def _together(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["result"]) for check in report["cluster"]}


@pytest.mark.long
def test_nodes_that_agree_and_write_to_each_other() -> None:
    """No EFA here is what the setting asks for; the cluster is well, and the exit status says so."""
    with hosts(2, _INTERFACES) as machines, ray_cluster(machines, _SETTINGS) as cluster:
        report = _examine(cluster, 0)
    assert len(report["nodes"]) == 2
    assert {name: status for name, (status, _) in _together(report).items()} == {
        "same-on-all-nodes": "ok",
        "pair-writes": "ok",
    }
    (link,) = report["links"]
    assert link["bytes_per_second"] > 0
    assert link["latency_s"] > 0


def test_every_trouble_is_named_with_its_node(tmp_path: Path) -> None:
    """One node has another vLLM and another setting, one cannot be written to, and Ray works all the same."""
    with hosts(3, _INTERFACES) as machines:
        other = {"PYTHONPATH": _with_another_vllm(machines[1], tmp_path), "EFA_EP_TIMEOUT_S": "7"}
        with ray_cluster(machines, _SETTINGS, {1: other}) as cluster:
            machines[2].cut(DATA_INTERFACE)
            report = _examine(cluster, 1)
    together = _together(report)
    status, result = together["same-on-all-nodes"]
    assert status == "failed"
    assert "vLLM" in result
    assert "0.0.1+cpu on" in result
    assert "EFA_EP_TIMEOUT_S=7 on" in result
    status, result = together["pair-writes"]
    assert status == "failed"
    assert "2 of 3 pairs of nodes cannot write to each other" in result
    links = {tuple(link["nodes"]): link for link in report["links"]}
    assert links[0, 1]["error"] == ""
    assert links[0, 1]["bytes_per_second"] > 0
    for pair in ((0, 2), (1, 2)):
        assert links[pair]["error"] != ""


def _with_another_vllm(host: Host, directory: Path) -> str:
    """Return the module path of a host that seems to have another vLLM than the others."""
    described = directory / "vllm-0.0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0.1+cpu\n")
    return os.pathsep.join([str(directory), environment_on(host)["PYTHONPATH"]])
