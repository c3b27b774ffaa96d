"""Serve a small MoE model on two "nodes" of this machine and show that it answers like one process.

Two data-parallel ranks, each its own node, exchange all expert rows through libfabric over TCP on the
loopback interface: what travels here is what travels over EFA between machines. Nothing is downloaded.

    python examples/local/demo.py           ends by itself; status 0 if all answers are equal
    python examples/local/demo.py --keep    leaves the server running
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAMILY = "qwen3_moe"
HOST = "127.0.0.1"
PROMPTS = ("hello world", "the quick brown fox", "mixture of experts", "dispatch and combine", "EFA", "vLLM")
NEW_TOKENS = 24
START_SECONDS = 300
STOP_SECONDS = 40
SERVER_FLAGS = (
    # float32: the greedy tokens of bfloat16 runs differ between batch compositions.
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--served-model-name", "demo", "--host", HOST),
)
TWO_NODES_FLAGS = (
    *("--data-parallel-size", "2", "--enable-expert-parallel"),
    *("--all2all-backend", "efa_ep_low_latency", "--api-server-count", "1"),
)
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM's default binding leaves too few cores for several workers on a small machine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def say(text: str) -> None:
    """Print progress at once."""
    print(text, flush=True)


def prepare_model(directory: Path) -> Path:
    """Write the model unless an earlier run did."""
    model = directory / FAMILY
    if (model / "model.safetensors").exists():
        say(f"model: reusing {model}")
        return model
    say(f"model: writing a small {FAMILY} with random weights to {model}")
    command = [sys.executable, str(HERE / "write_model.py"), FAMILY, "--out", str(directory)]
    subprocess.run(command, check=True, env={**os.environ, **VLLM_ENVIRONMENT}, stderr=subprocess.DEVNULL)
    return model


def free_port() -> int:
    """Return a TCP port that is free right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(
    model: Path, flags: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run ``vllm serve`` in a session of its own; yield it and its port when it is healthy, stop it after."""
    port = free_port()
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if vllm is None:
        raise DemoError("no command `vllm` beside this Python; run `make demo`, which sets it up")
    command = [vllm, "serve", str(model), *SERVER_FLAGS, "--port", str(port), *flags]
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    say(f"  $ {variables} vllm serve {' '.join(command[2:])}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **VLLM_ENVIRONMENT, **environment},
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, port, log)
        yield process, port
    finally:
        stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait for the health endpoint and show that time passes."""
    start = time.monotonic()
    while time.monotonic() - start < START_SECONDS:
        if process.poll() is not None:
            raise DemoError(f"vllm serve ended with status {process.returncode}; its log: {log}\n{tail(log)}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2),
        ):
            print(f"\r  healthy after {time.monotonic() - start:.0f} s", flush=True)
            return
        print(f"\r  starting ... {time.monotonic() - start:.0f} s", end="", flush=True)
        time.sleep(1)
    raise DemoError(f"vllm serve was not healthy after {START_SECONDS} s; its log: {log}\n{tail(log)}")


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then end what is left of its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def complete(port: int, prompt: str) -> dict[str, Any]:
    """Return the greedy continuation of a prompt: its text and its token ids."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


def complete_all(port: int) -> list[dict[str, Any]]:
    """Complete all prompts at once, so that both ranks are busy."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: complete(port, prompt), PROMPTS))


def compare(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> int:
    """Print every answer and return how many differ from the reference."""
    differing = 0
    for prompt, want, got in zip(PROMPTS, expected, actual, strict=True):
        same = want["token_ids"] == got["token_ids"]
        differing += not same
        verdict = "same tokens" if same else f"DIFFERENT, one process says {want['token_ids']}"
        say(f"  {prompt!r} -> {got['token_ids'][:8]}... {verdict}")
    return differing


def write_secret(file: Path) -> Path:
    """Write the run's secret: a process that does not have it is no rank, whatever ports it reaches."""
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    return file


def settled_counters(directory: Path) -> list[dict[str, Any]]:
    """Return the counters of each rank, which writes them four times a second, once they stand still."""
    ranks: list[dict[str, Any]] = []
    for _ in range(20):
        before = ranks
        time.sleep(0.5)
        files = sorted(directory.glob("rank*.json"))
        ranks = [each for path in files for each in json.loads(path.read_text())["all_to_alls"]]
        if ranks and ranks == before and all(each["rounds"] for each in ranks):
            return ranks
    raise DemoError(f"the ranks wrote no counters to {directory}: the backend was not used")


def show_traffic(directory: Path) -> None:
    """Print what each rank put on the network."""
    ranks = settled_counters(directory)
    say(f"  libfabric provider {ranks[0]['provider']} ({ranks[0]['library']}), {ranks[0]['nodes']} nodes")
    say("  rank  rounds  tokens  rows sent  bytes sent  writes  per round")
    for each in ranks:
        sent = f"{each['network_rows']:9}  {each['bytes_written']:10}  {each['writes']:6}"
        per_round = each["writes"] / max(each["rounds"], 1)
        say(f"  {each['rank']:4}  {each['rounds']:6}  {each['tokens']:6}  {sent}  {per_round:9.1f}")
    say("  time per round, in microseconds (most of a receive half is waiting for the other rank)")
    for each in ranks:
        halves = (
            f"{half} {1e6 * seconds / max(each['rounds'], 1):.0f}"
            for half, seconds in each["half_seconds"].items()
        )
        say(f"  rank {each['rank']}: {', '.join(halves)}")


def run(directory: Path, keep: bool) -> int:
    """Run both servers; return the number of differing answers."""
    model = prepare_model(directory)
    stats = directory / "stats"
    shutil.rmtree(stats, ignore_errors=True)
    say("\nreference: one process, no plugin")
    with running_server(model, (), {"VLLM_PLUGINS": ""}, directory / "reference.log") as (_, port):
        expected = complete_all(port)

    say("\ntwo nodes: data parallel 2, expert parallel, every expert row over libfabric")
    two_nodes = {
        "EFA_EP_RANKS_PER_NODE": "1",
        "EFA_EP_PROVIDER": "tcp",
        "EFA_EP_STATS_DIR": str(stats),
        "EFA_EP_TOKEN_FILE": str(write_secret(directory / "secret")),
    }
    with running_server(model, TWO_NODES_FLAGS, two_nodes, directory / "two_nodes.log") as (server, port):
        differing = compare(expected, complete_all(port))
        say("\nwhat travelled")
        show_traffic(stats)
        if keep and not differing:
            keep_running(server, port)
    say(
        f"\n{differing} of {len(PROMPTS)} answers DIFFER from the single process"
        if differing
        else f"\nall {len(PROMPTS)} answers equal the single process's, token by token"
    )
    return differing


def keep_running(server: subprocess.Popen[bytes], port: int) -> None:
    """Say how to use the server and wait until it or the user ends it."""
    say(f"\nthe server keeps running on http://{HOST}:{port}; Ctrl-C ends it. For example:")
    say(
        f"  curl http://{HOST}:{port}/v1/completions -H 'Content-Type: application/json' "
        """-d '{"model": "demo", "prompt": "hello", "max_tokens": 16}'"""
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.wait()


def main() -> int:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the server running when everything is shown"
    )
    parser.add_argument(
        "--directory", type=Path, default=HERE.parents[1] / "build" / "demo", help="model, logs"
    )
    arguments = parser.parse_args()
    say("vllm-efa-ep demo: about a minute on two cores")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    # Unwind on SIGTERM too, so that the running server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return 1 if run(arguments.directory, arguments.keep) else 0
    except DemoError as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
