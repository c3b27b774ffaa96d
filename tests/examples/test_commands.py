"""The commands in the pages of examples/ name what is there: files, Kubernetes objects, secrets.

No cluster is here to run them on; what the scripts and the manifests among them do is tested beside this.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_files import EXAMPLES, ROOT
from manifests import objects

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./-]*(?:\.yaml|\.sh|\.sbatch|Dockerfile)")
# Where the page for ParallelCluster puts the repository.
CHECKOUT = "/shared/vllm-efa-ep/"


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Yield (page, words)."""
    for page in sorted(EXAMPLES.rglob("README.md")):
        for block in SHELL_BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, shlex.split(line, comments=True)


COMMANDS = list(commands())


def of_kubectl(verb: str) -> list[list[str]]:
    """Return what stands behind ``kubectl VERB``."""
    return [words[2:] for _, words in COMMANDS if words[:2] == ["kubectl", verb]]


def named(value: Any, key: str) -> Iterator[Any]:
    """Yield every value of a key, however deep."""
    if isinstance(value, dict):
        yield from (below for name, below in value.items() if name == key)
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from named(below, key)


def test_every_file_is_there() -> None:
    """Beside the page, or from the repository's root."""
    files = [(page, word) for page, words in COMMANDS for word in words if FILE.fullmatch(word)]
    assert {"cluster.yaml", "leaderworkerset.yaml", "examples/eks/Dockerfile"} <= {name for _, name in files}
    for page, name in files:
        relative = name.removeprefix(CHECKOUT)
        assert (page.parent / relative).exists() or (ROOT / relative).exists(), f"{page}: {name}"


def test_the_secrets_are_those_that_pods_use() -> None:
    """All of them, by the names and keys that the manifests have; optional ones as well."""
    created = {words[2]: words[3] for words in of_kubectl("create") if words[:2] == ["secret", "generic"]}
    used = {each["name"] for _, item in objects() for each in named(item, "secretKeyRef")}
    used |= {each["secretName"] for _, item in objects() for each in named(item, "secret")}
    assert created.keys() == used
    assert all(value.startswith("--from-literal=token=") for value in created.values())


@pytest.mark.parametrize("verb", ["port-forward", "exec"])
def test_objects_are_in_the_manifests(verb: str) -> None:
    """``job/NAME`` and ``service/NAME``; the first pod of a LeaderWorkerSet is NAME-0."""
    there = {f"{item['kind'].lower()}/{item['metadata']['name']}" for _, item in objects()}
    there |= {f"{item['metadata']['name']}-0" for _, item in objects() if item["kind"] == "LeaderWorkerSet"}
    names = [next(word for word in words if not word.startswith("-")) for words in of_kubectl(verb)]
    assert names
    assert set(names) <= there


def test_logs_are_of_the_pod_that_reports() -> None:
    """Its labels: the manifest's own, and the index that an indexed job gives to each of its pods."""
    jobs = [item["spec"] for _, item in objects() if item["kind"] == "Job"]
    commands = of_kubectl("logs")
    assert commands
    for words in commands:
        selector = dict(label.split("=") for label in words[words.index("-l") + 1].split(","))
        index = int(selector.pop("batch.kubernetes.io/job-completion-index"))
        (job,) = (job for job in jobs if selector.items() <= job["template"]["metadata"]["labels"].items())
        assert job["completionMode"] == "Indexed"
        assert index < job["completions"]
