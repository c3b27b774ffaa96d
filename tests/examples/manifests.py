"""The Kubernetes objects of ``examples/eks``, and the pods that they would start."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from example_files import EXAMPLES

FILES = ("doctor.yaml", "leaderworkerset.yaml", "rayjob.yaml")


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file, object), those of lists one by one."""
    for name in FILES:
        for document in yaml.safe_load_all((EXAMPLES / "eks" / name).read_text()):
            for item in document["items"] if document["kind"] == "List" else [document]:
                yield name, item


@dataclass(frozen=True)
class PodTemplate:
    """A pod that an object would start.

    Attributes:
        where: File, object and place in it.
        spec: The pod's specification.

    """

    where: str
    spec: dict[str, Any]

    def as_pod(self) -> dict[str, Any]:
        """Return it as an object of its own."""
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": self.spec}


def pods() -> list[PodTemplate]:
    """Return every pod template of every object."""
    return [
        PodTemplate(f"{name} {item['kind']} {item['metadata']['name']}{where}", spec)
        for name, item in objects()
        for where, spec in _pod_specs(item, "")
    ]


def _pod_specs(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "containers" in value:
            yield where, value
            return
        for key, below in value.items():
            yield from _pod_specs(below, f"{where}.{key}")
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _pod_specs(below, f"{where}[{number}]")


def image_file() -> Path:
    """Return the Dockerfile."""
    return EXAMPLES / "eks" / "Dockerfile"
