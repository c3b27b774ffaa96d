"""vLLM's fault-tolerance mode in real servers: what it survives with our backends, and where it ends.

On CPUs vLLM asks no ``query_fault``, because it schedules synchronously there; the error that a half raises
takes its place, and everything after it is the same.
"""

import contextlib
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_plugin import install
from vllm_server import ANSWER_SECONDS, HOST, PROMPTS, Server, reserved_port, serve

# Enough for the live rank to do its part, on a machine that has more to do.
TIMEOUT_S = 10
# How long vLLM waits for the word to go on: where it comes, and where it never does.
RECOVERY_S, SHORT_RECOVERY_S = 200, 20
# Our deadline, vLLM's own time, and a loaded machine.
DEADLINE_S = TIMEOUT_S + SHORT_RECOVERY_S + 180


def status(server: Server) -> dict[str, Any]:
    """Return what the server says of its engine."""
    with urllib.request.urlopen(
        f"http://{HOST}:{server.port}/fault_tolerance/status", timeout=ANSWER_SECONDS
    ) as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def retry(server: Server) -> None:
    """Tell the server to go on."""
    request = urllib.request.Request(
        f"http://{HOST}:{server.port}/fault_tolerance/apply",
        json.dumps({"instruction": "retry"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        assert answer.status == 202


def await_status(server: Server, word: str) -> None:
    """Return when the engine is healthy or unhealthy."""
    deadline = time.monotonic() + DEADLINE_S
    while word not in str(said := status(server)):
        assert time.monotonic() < deadline, f"{said} instead of {word}\n{server.log_tail()}"
        time.sleep(0.2)


@contextlib.contextmanager
def two_servers(
    model: Path, backend: str, environment: dict[str, str], logs: Path, recovery_s: int = RECOVERY_S
) -> Iterator[list[Server]]:
    """Run one server per data-parallel rank, as the mode wants it, until the block ends."""
    with reserved_port() as rpc_port, contextlib.ExitStack() as stack:
        flags = [
            *("--enable-expert-parallel", "--data-parallel-size", "2", "--enforce-eager"),
            *("--data-parallel-address", HOST, "--data-parallel-rpc-port", str(rpc_port)),
            *("--all2all-backend", f"efa_ep_{backend}", "--api-server-count", "1"),
            "--enable-fault-tolerance",
            *("--fault-tolerance-config", json.dumps({"engine_recovery_timeout_sec": recovery_s})),
        ]
        servers = [
            stack.enter_context(
                serve(
                    model, [*flags, "--data-parallel-rank", str(rank)], environment, logs / f"rank{rank}.log"
                )
            )
            for rank in range(2)
        ]
        for server in servers:
            server.wait_until_healthy()
        yield servers


def frozen_process(server: Server) -> psutil.Process:
    """Wait for a process of the server that has been stopped by a signal, and return it."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for process in server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    return process
        time.sleep(0.1)
    raise TimeoutError("nobody froze\n" + server.log_tail())


def environment_of(signal_number: signal.Signals, directory: Path) -> dict[str, str]:
    """Let rank 1 send itself a signal in the first round after ``fail-now`` has appeared."""
    return {
        "EFA_EP_TIMEOUT_S": str(TIMEOUT_S),
        "EFA_EP_RANKS_PER_NODE": "1",
        "EFA_EP_PROVIDER": "tcp",
        "PYTHONPATH": install(directory),
        "FAULT_RANK": "1",
        "FAULT_SIGNAL": str(int(signal_number)),
        "FAULT_FILE": str(directory / "fail-now"),
    }


def names_rank_1(server: Server) -> bool:
    """Whether all errors of ours in the log name the culprit, and there are some."""
    lines = [line for line in server.log_text().splitlines() if "EFA EP: " in line and "ERROR" in line]
    return bool(lines) and all(re.search(r"\brank 1\b", line) for line in lines)


@pytest.mark.parametrize("backend", ["low_latency", pytest.param("high_throughput", marks=pytest.mark.long)])
def test_a_rank_that_was_frozen_comes_back(backend: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Both servers report the fault, live through it, and answer as before after a retry."""
    environment = environment_of(signal.SIGSTOP, tmp_path)
    with two_servers(models["qwen3_moe"], backend, environment, tmp_path) as servers:
        before = [server.complete(PROMPTS[0]) for server in servers]
        (tmp_path / "fail-now").touch()
        with ThreadPoolExecutor() as pool:
            aborted = pool.submit(servers[0].complete, PROMPTS[0])
            frozen = frozen_process(servers[1])
            await_status(servers[0], "unhealthy")
            assert len(aborted.result()) < len(before[0])
        assert names_rank_1(servers[0]), servers[0].log_tail()
        (tmp_path / "fail-now").unlink()
        os.kill(frozen.pid, signal.SIGCONT)
        await_status(servers[1], "unhealthy")
        for server in servers:
            retry(server)
        for server in servers:
            await_status(server, "'healthy'")
        assert [server.complete(PROMPTS[0]) for server in servers] == before


@pytest.mark.long
def test_a_rank_that_is_dead_ends_the_others_when_the_time_for_recovery_is_over(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Nobody hangs. A retry would not help: vLLM connects all its ranks before we agree on the live ones."""
    environment = environment_of(signal.SIGKILL, tmp_path)
    model = models["qwen3_moe"]
    with two_servers(model, "low_latency", environment, tmp_path, SHORT_RECOVERY_S) as servers:
        assert servers[0].complete(PROMPTS[0])
        (tmp_path / "fail-now").touch()
        with ThreadPoolExecutor() as pool:
            pool.submit(servers[0].complete, PROMPTS[0])
            await_status(servers[0], "unhealthy")
        assert names_rank_1(servers[0]), servers[0].log_tail()
        for server in servers:
            server.process.wait(DEADLINE_S)
            _, leaked = psutil.wait_procs(server.processes(), timeout=60)
            assert not leaked, f"left behind: {leaked}\n{server.log_tail()}"
