"""What the operators themselves say of their resources, made strict: ``schemas/`` has what they publish.

Each file names its origin, version and licence, and is made by ``reduce_schema.py``.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
from reduce_schema import below

SCHEMAS = Path(__file__).parent / "schemas"
OF_KIND = {"LeaderWorkerSet": "leaderworkerset", "RayJob": "rayjob", "ClusterConfig": "clusterconfig"}


def published(kind: str) -> dict[str, Any]:
    """Return the schema of a kind as it is in its file."""
    found: dict[str, Any] = json.loads((SCHEMAS / f"{OF_KIND[kind]}.json").read_text())
    return found


def validator(kind: str) -> "jsonschema.protocols.Validator":
    """Return what refuses all that an operator refuses, and every field that it does not know.

    Kubernetes drops such a field of a custom resource without a word. eksctl's schema has no such places.
    """
    schema = published(kind)
    if "$schema" in schema:
        return jsonschema.Draft7Validator(schema)
    strict = strictly(schema, "")
    strict["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which its own tool checks
    return jsonschema.Draft202012Validator(strict)


def strictly(part: Any, _: str) -> Any:
    """Return a part of a custom resource's schema that allows what it names, and nothing else.

    A part for which Kubernetes evaluates rules, which JSON schemas cannot, is refused as a whole.
    """
    if not isinstance(part, dict):
        return part
    if "x-kubernetes-validations" in part:
        return False
    strict = below(part, strictly)
    if part.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if part.get("type") == "object" and not part.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
