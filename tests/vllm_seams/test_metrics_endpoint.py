"""Our metrics are on vLLM's own /metrics, in both of prometheus_client's modes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("several_api_servers", [False, True], ids=["one", "several"])
def test_vllm_shows_our_metrics(several_api_servers: bool, tmp_path: Path) -> None:
    """Only if one of our backends is configured; the directory of snapshots goes with the process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    environment["TMPDIR"] = str(tmp_path)
    if several_api_servers:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("check_metrics.py")
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    directory = Path(result.stdout.splitlines()[-1])
    assert directory.parent == tmp_path
    assert not directory.exists()
