"""A rank that dies or hangs while it serves ends the server soon, with a log line that names the rank."""

import contextlib
import re
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from fault_plugin import install
from vllm_server import PROMPTS, Server, serve

# Enough for the live rank to do its part, on a machine that has more to do.
TIMEOUT_S = 10
# Our deadline, and what vLLM grants its own processes to end.
EXIT_DEADLINE_S = TIMEOUT_S + 180


def keep_asking(server: Server) -> threading.Thread:
    """Send completions from another thread until the server no longer answers."""

    def ask() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.complete(PROMPTS[-1])

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("backend", ["high_throughput", pytest.param("low_latency", marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_failed_rank_is_named_and_the_server_ends(
    fault: signal.Signals, backend: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Rank 1 fails between the dispatch and the combine of a round."""
    command = tmp_path / "fail-now"
    environment = {
        "EFA_EP_TIMEOUT_S": str(TIMEOUT_S),
        "EFA_EP_RANKS_PER_NODE": "1",
        "EFA_EP_PROVIDER": "tcp",
        "PYTHONPATH": install(tmp_path),
        "FAULT_RANK": "1",
        "FAULT_SIGNAL": str(int(fault)),
        "FAULT_FILE": str(command),
    }
    flags = [
        *("--enable-expert-parallel", "--data-parallel-size", "2", "--enforce-eager"),
        *("--all2all-backend", f"efa_ep_{backend}", "--api-server-count", "1"),
    ]
    with serve(models["qwen3_moe"], flags, environment, tmp_path / "server.log") as server:
        server.wait_until_healthy()
        assert server.complete(PROMPTS[0])
        asking = keep_asking(server)
        command.touch()
        try:
            server.process.wait(EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server still runs {EXIT_DEADLINE_S} s after a rank failed\n{server.log_tail()}")
        asking.join()
        log = server.log_text()
        # Processes that vLLM has told to end may take a moment to do so.
        _, leaked = psutil.wait_procs(server.processes(), timeout=60)
        assert not leaked, f"left behind: {leaked}\n{server.log_tail()}"
    lines = [line for line in log.splitlines() if "EFA EP: " in line and "ERROR" in line]
    assert lines, f"nothing names the failed rank\n{log[-6000:]}"
    assert all(re.search(r"\brank 1\b", line) for line in lines), "\n".join(lines)
