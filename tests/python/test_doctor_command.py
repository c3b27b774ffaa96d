"""``vllm-efa-ep doctor`` as a user types it."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_machines import good_machine, machine_without_efa
from reserved_port import reserved_port
from rich.console import Console

from vllm_efa_ep.cli import main
from vllm_efa_ep.doctor.checks import CHECKS
from vllm_efa_ep.doctor.examination import Report, examine
from vllm_efa_ep.doctor.hardware import efa_devices, nvidia_gpus
from vllm_efa_ep.doctor.rendering import render
from vllm_efa_ep.doctor.system import this_system

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600
_FILE = ["--token-file", "none"]


def start(*options: str) -> "subprocess.Popen[str]":
    """Start the command."""
    program = "import sys; from vllm_efa_ep.cli import main; sys.exit(main(['doctor', *sys.argv[1:]]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_nodes_of_this_machine_are_told_the_truth(tmp_path: Path) -> None:
    """No EFA and no GPU here: the CPU device over TCP, exit status 0; and both write to each other."""
    if efa_devices(this_system()) or nvidia_gpus(this_system()):
        pytest.skip("this machine has EFA devices or GPUs; the test is about one that has neither")
    secret = tmp_path / "token"
    secret.write_text("a" * 64)
    with reserved_port() as port:
        common = ("--json", "--nodes", "2", "--meet", f"127.0.0.1:{port}", "--token-file", str(secret))
        nodes = [start(*common, "--node", str(node), "--timeout", "100") for node in range(2)]
        try:
            outputs = [node.communicate(timeout=DEADLINE_S) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[1][0] == ""  # node 0 speaks for all
    for _, log in outputs:
        assert f"checking that all 2 nodes meet at 127.0.0.1:{port}\n" in log
        assert all(f"checking {check.name}\n" in log for check in CHECKS)
    report: dict[str, Any] = json.loads(outputs[0][0])
    assert report["status"] == "warning"
    for node in report["nodes"]:
        found = {check["name"]: check for check in node["checks"]}
        assert list(found) == [check.name for check in CHECKS]
        assert found["efa-devices"]["status"] == found["provider"]["status"] == "warning"
        assert "no EFA device" in found["efa-devices"]["result"]
        assert "the CPU device" in found["device"]["result"]
        assert found["vllm"]["status"] == found["local-write"]["status"] == "ok", found
    together = {check["name"]: check["status"] for check in report["cluster"]}
    assert together == {"same-on-all-nodes": "ok", "pair-writes": "ok"}
    assert report["links"][0]["bytes_per_second"] > 0
    assert "make demo" in report["next"][0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "2"], "--nodes, --node, --meet and --token-file belong together"),
        (["--ray", "--nodes", "2"], "leave out --nodes"),
        (["--nodes", "2", "--node", "2", "--meet", "localhost:1", *_FILE], "--node 2 is not one of 0 to 1"),
        (["--nodes", "1", "--node", "0", "--meet", "localhost", *_FILE], "is no HOST:PORT"),
        (["--nodes", "1", "--node", "0", "--meet", "localhost:1", *_FILE], "none: No such file"),
        (["--nodes", "1", "--node", "0", "--meet", "localhost:1", "--token-file", "/dev/null"], "0 bytes"),
        (["--timeout", "0"], "--timeout 0 is too short"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 2 and the remedy, before anything is examined."""
    assert main(["doctor", *options]) == 2
    assert says in capsys.readouterr().err


def test_without_ray_the_other_way_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray is an extra; this machine alone must not pass for a cluster."""
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("vllm_efa_ep.doctor.cluster.on_ray", "vllm_efa_ep.bootstrap.ray_hosts"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # which other tests have imported
    assert main(["doctor", "--ray"]) == 2
    assert "--nodes" in capsys.readouterr().err


def rendered(report: Report) -> str:
    """Return a report as a wide terminal shows it, on one line."""
    screen = io.StringIO()
    render(report, Console(width=200, file=screen))
    return " ".join(screen.getvalue().replace("│", " ").split())


def test_the_table_names_nodes_that_differ(tmp_path: Path) -> None:
    """What all nodes share is one row; what differs says on which node."""
    machines = [good_machine("p5en", tmp_path / "a"), good_machine("p5en", tmp_path / "b")]
    machines[1].environment["FI_EFA_MTU_SIZE"] = "8192"
    nodes = [examine(machine.system) for machine in machines]
    text = rendered(Report(["alpha", "beta"], nodes))
    assert text.count("driver efa 3.3.0g serves all 16 EFA devices") == 1
    assert "on 1 (beta): FI_EFA_MTU_SIZE set" in text
    assert "failed: 1 failed, 0 warnings" in text
    assert "fix: `unset FI_EFA_MTU_SIZE" in text
    assert "next: Mend fabric-variables" in text


def test_the_table_of_one_machine_says_what_to_do(tmp_path: Path) -> None:
    """Every check has its row, every warning its reason and its fix."""
    text = rendered(Report(["here"], [examine(machine_without_efa(tmp_path).system)]))
    for check in CHECKS:
        assert check.name in text
    assert text.count("why: ") == text.count("fix: ") == 2
    assert "next: Here: try it" in text


def test_the_reference_is_up_to_date() -> None:
    """docs/doctor.md is what the command prints."""
    printed = start("--markdown").communicate(timeout=DEADLINE_S)[0]
    assert (ROOT / "docs" / "doctor.md").read_text() == printed
