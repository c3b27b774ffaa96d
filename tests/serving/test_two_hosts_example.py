"""The example with two hosts does what its page says, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_server import ROOT

sys.path.append(str(ROOT / "tests" / "hosts"))

from network import why_impossible

_SECONDS = 400


@pytest.mark.long
@pytest.mark.skipif(bool(why_impossible()), reason=why_impossible())
def test_two_hosts_serve(tmp_path: Path) -> None:
    """It answers, and both ranks sent rows to the other host."""
    command = [str(ROOT / "examples/local/two_hosts.sh")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        status = subprocess.run(
            command,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
        ).returncode
    text = log.read_text(errors="replace")
    assert status == 0, text
    assert "answer: [" in text
    assert "the ranks meet over RayBootstrap" in text
    assert "the run has no secret" not in text
    for rank in range(2):
        assert f"rank {rank}: " in text
    assert ": 0 rows" not in text
    namespaces = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert "two-hosts" not in namespaces
    assert not list(Path("/tmp").glob("two-hosts-*"))
