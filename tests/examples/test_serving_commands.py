"""Every ``vllm serve`` command line of the examples, as scripts and manifests really make it, is understood.

The scripts run with programs that only tell what they were asked; vLLM's own parser reads what ``vllm`` was
asked.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from example_files import EXAMPLES, RunTool
from fake_programs import FakePrograms
from manifests import image_file, objects, pods
from test_commands import commands as documented_commands

from vllm_efa_ep.cli import parser as own_parser
from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

BACKENDS = {"mixed": HIGH_THROUGHPUT, "prefill": HIGH_THROUGHPUT, "decode": LOW_LATENCY}
MODELS = {"deepseek-v3": "deepseek-ai/DeepSeek-V3", "kimi-k2": "moonshotai/Kimi-K2-Instruct"}
INSTANCES = ("p5en", "p6-b200", "p6-b300")
NODES = 2
GPUS = 8


@dataclass(frozen=True)
class Serving:
    """One node of one way to serve.

    Attributes:
        model: First word of serve.sh.
        role: Second word.
        environment: Variables.

    """

    model: str
    role: str
    environment: dict[str, str]


WAYS = [
    Serving(model, role, {"INSTANCE": instance, "NODES": str(NODES), "LEADER": "10.0.0.1", **node})
    for model, role, instance in itertools.product(MODELS, BACKENDS, INSTANCES)
    for node in ({"NODE": "0"}, {"NODE": "1"}, {"LAUNCH": "ray"})
]


@pytest.fixture
def programs(tmp_path: Path) -> FakePrograms:
    """Return fake programs."""
    return FakePrograms(tmp_path)


class VllmParser:
    """vLLM's parser in a process of its own, which loads vLLM once for all tests."""

    def __init__(self, errors: Path) -> None:
        """Start it; its error output goes to a file."""
        self._errors = errors
        program = Path(__file__).with_name("vllm_parser.py")
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def parse(self, command: list[str]) -> dict[str, Any]:
        """Parse a ``vllm`` command line; fails with its refusal."""
        assert command[0] == "vllm"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command[1:]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(("{", '"')):  # vLLM logs to standard output as well
                answer = json.loads(line)
                assert not isinstance(answer, str), answer
                return dict(answer)
        pytest.fail(f"the parser ended: {self._errors.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def vllm_parser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmParser]:
    """Return vLLM's parser."""
    parser = VllmParser(tmp_path_factory.mktemp("parser") / "errors")
    try:
        yield parser
    finally:
        parser.process.kill()
        parser.process.communicate()


def served(programs: FakePrograms) -> list[list[str]]:
    """Return the ``vllm`` command lines that were asked; every ``vllm-efa-ep`` one must be understood."""
    asked = programs.asked()
    for program, *words in asked:
        if program == "vllm-efa-ep":
            own_parser().parse_args(words)
    return [command for command in asked if command[0] == "vllm"]


def test_vllm_understands_every_way_to_serve(programs: FakePrograms, vllm_parser: VllmParser) -> None:
    """Models, roles, instances and nodes; the nodes' ranks add up, and each role has its backend."""
    for way in WAYS:
        result = programs.run(["serve-moe", way.model, way.role], **way.environment)
        assert result.returncode == 0, result.stderr
        (command,) = served(programs)
        assert command[1:3] == ["serve", MODELS[way.model]]
        options = vllm_parser.parse(command)
        assert options["enable_expert_parallel"]
        assert options["all2all_backend"] == BACKENDS[way.role]
        assert options["data_parallel_size"] == NODES * GPUS
        assert options["data_parallel_size_local"] == GPUS
        node = int(way.environment.get("NODE", "0"))
        assert options["headless"] == (node > 0)
        assert (options["data_parallel_start_rank"] or 0) == node * GPUS
        assert (options["data_parallel_backend"] == "ray") == ("LAUNCH" in way.environment)
        if way.role == "decode":
            assert options["max_num_batched_tokens"] == options["max_num_seqs"]


def test_a_wrong_option_is_refused(vllm_parser: VllmParser) -> None:
    """Protects the test above against a parser that accepts all."""
    with pytest.raises(AssertionError, match="all2all-backend"):
        vllm_parser.parse(["vllm", "serve", "model", "--all2all-backend", "efa_ep"])


def test_vllm_understands_what_the_pods_run(programs: FakePrograms, vllm_parser: VllmParser) -> None:
    """The commands of the manifests, with the variables that LeaderWorkerSet and the manifests set."""
    commands = []
    for pod in pods():
        container = pod.spec["containers"][0]
        command = container.get("command", []) + container.get("args", [])
        if command[:1] != ["serve-moe"]:
            continue
        variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        for index in range(2) if "workerTemplate" in pod.where else [0]:
            lws = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": "moe-0.moe"}
            result = programs.run(command, **variables, **lws)
            assert result.returncode == 0, result.stderr
            commands += served(programs)
    entrypoints = [item["spec"]["entrypoint"] for _, item in objects() if item["kind"] == "RayJob"]
    for entrypoint in entrypoints:
        result = programs.run(["sh", "-c", entrypoint])
        assert result.returncode == 0, result.stderr
        commands += served(programs)
    assert len(commands) >= 7
    assert all(vllm_parser.parse(command)["data_parallel_size"] == 16 for command in commands)


# In the tools' environment.
ROUTER = """
import argparse, importlib.metadata, json, sys
from vllm_router.router_args import RouterArgs
parser = argparse.ArgumentParser()
RouterArgs.add_cli_args(parser, use_router_prefix=False)
for words in json.loads(sys.argv[1]):
    parser.parse_args(words)
print(importlib.metadata.version("vllm-router"))
"""


def test_the_router_understands_its_commands(run_tool: RunTool) -> None:
    """Those of the pages and the manifests, by the parser of the version that the image installs."""
    containers = [pod.spec["containers"][0] for pod in pods()]
    commands = [each.get("command", []) + each.get("args", []) for each in containers]
    commands += [words for _, words in documented_commands()]
    lines = [words[1:] for words in commands if words[:1] == ["vllm-router"]]
    assert len(lines) == 2
    parsed = run_tool("python", "-c", ROUTER, json.dumps(lines))
    assert parsed.returncode == 0, parsed.stderr
    assert f"vllm-router=={parsed.stdout.strip()} " in image_file().read_text()
    refused = run_tool("python", "-c", ROUTER, json.dumps([[*lines[0], "--prefil", "http://prefill:8000"]]))
    assert refused.returncode == 2


def test_the_doctors_job_is_understood() -> None:
    """Its variable stands for a number."""
    (job,) = [item for _, item in objects() if item["kind"] == "Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    words = [word.replace("$(NODE)", "1") for word in container["command"] + container["args"]]
    options = own_parser().parse_args(words[1:])
    assert (options.nodes, options.node, options.require_efa) == (job["spec"]["completions"], 1, True)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_slurm_job_starts_ray_and_serves(
    programs: FakePrograms, vllm_parser: VllmParser, nodes: int, tmp_path: Path
) -> None:
    """Ray on every node, then the doctor, which may end the job, then vLLM on Ray.

    They have one secret, which does not stay.
    """
    result = programs.run(
        ["bash", str(EXAMPLES / "parallelcluster" / "serve.sbatch"), "kimi-k2", "mixed"],
        SLURM_NNODES=str(nodes),
        SLURM_JOB_ID="7",
        HOME=str(tmp_path),
        EXAMPLES=str(EXAMPLES),
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".efa-ep-7").exists()
    asked = programs.asked()
    secrets = programs.secrets()
    assert secrets["vllm"] == secrets["vllm-efa-ep"]
    assert len(bytes.fromhex(secrets["vllm"])) == 32
    ray_nodes = [command for command in asked if command[0] == "srun"]
    assert len(ray_nodes) == min(nodes, 2)
    others = [command for command in asked if command[0] in ("vllm", "vllm-efa-ep")]
    assert others[0][:3] == ["vllm-efa-ep", "doctor", "--ray"]
    options = vllm_parser.parse(others[1])
    assert options["data_parallel_backend"] == "ray"
    assert options["data_parallel_size"] == nodes * GPUS


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["serve-moe", "llama", "decode"], {}, "MODEL is llama; use deepseek-v3 or kimi-k2"),
        (["serve-moe", "kimi-k2", "train"], {}, "ROLE is train; use mixed, prefill or decode"),
        (["serve-moe", "kimi-k2", "decode"], {"INSTANCE": "p3"}, "INSTANCE is p3; use p5en"),
        (["serve-moe", "kimi-k2", "decode"], {"LAUNCH": "mpi"}, "LAUNCH is mpi; use mp or ray"),
    ],
)
def test_wrong_words_are_refused(
    programs: FakePrograms, words: list[str], environment: dict[str, str], says: str
) -> None:
    """With the choices, before vLLM starts."""
    result = programs.run(words, **environment)
    assert result.returncode == 2
    assert says in result.stderr
    assert served(programs) == []


def test_no_command_line_escapes() -> None:
    """``vllm serve`` is in serve.sh alone, so that the tests above see every line."""
    for path in EXAMPLES.rglob("*"):
        text = path.is_file() and path.suffix != ".pyc"
        if text and "local" not in path.parts and path.name != "serve.sh":
            assert not re.search(r"^\s*[^#`\s]*vllm serve", path.read_text(), re.MULTILINE), path
