"""Reduces an operator's official definition of a resource to its schema: ``schemas/*.json`` are made by it.

    python tests/examples/reduce_schema.py NAME FILE > tests/examples/schemas/NAME.json

``FILE`` is the file that ``ORIGINS`` names, of that version. Nothing is left out but descriptions, the
status, which operators write, and versions that are stored no more; parts that occur several times, most of
them of pods, are kept once, so that 1.3 MB become 40 KB. Nothing is made stricter or laxer.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_WORTH_SHARING = 150  # characters of JSON
_ONE_BELOW = ("items", "additionalProperties", "not")
_MANY_BELOW = ("properties", "definitions", "$defs", "patternProperties")
_LISTS_BELOW = ("allOf", "anyOf", "oneOf")


class Origin(NamedTuple):
    """Where a definition is published; all three projects are under the Apache License 2.0.

    Attributes:
        repository: On GitHub.
        version: Its tag.
        path: Of the file.

    """

    repository: str
    version: str
    path: str


ORIGINS = {
    "clusterconfig": Origin("eksctl-io/eksctl", "v0.230.0", "pkg/apis/eksctl.io/v1alpha5/assets/schema.json"),
    "leaderworkerset": Origin(
        "kubernetes-sigs/lws", "v0.10.0", "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml"
    ),
    "rayjob": Origin("ray-project/kuberay", "v1.7.0", "ray-operator/config/crd/bases/ray.io_rayjobs.yaml"),
}

Schema = dict[str, Any]


def below(schema: Schema, change: Callable[[Any, str], Any]) -> Schema:
    """Return a schema with its direct parts changed; ``change`` gets a part and the name of its property."""
    changed = dict(schema)
    for key in _ONE_BELOW:
        if isinstance(schema.get(key), dict):
            changed[key] = change(schema[key], key)
    for key in _MANY_BELOW:
        if key in schema:
            changed[key] = {name: change(part, name) for name, part in schema[key].items()}
    for key in _LISTS_BELOW:
        if key in schema:
            changed[key] = [change(part, key) for part in schema[key]]
    return changed


def without_descriptions(schema: Any) -> Any:
    """Return a schema without what is for people only."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not key.startswith(("description", "x-intellij"))}
    return below(kept, lambda part, _: without_descriptions(part))


def with_shared_parts(schema: Schema) -> Schema:
    """Return a schema of the same meaning in which equal parts are one definition."""
    times: Counter[str] = Counter()

    def count(part: Any, _: str = "") -> Any:
        times[_text(part)] += 1
        if isinstance(part, dict) and times[_text(part)] == 1:
            below(part, count)
        return part

    names: dict[str, str] = {}
    shared: dict[str, Any] = {}

    def share(part: Any, name: str) -> Any:
        text = _text(part)
        if not isinstance(part, dict):
            return part
        if times[text] == 1 or len(text) < _WORTH_SHARING:
            return below(part, share)
        if text not in names:
            alike = sum(each.split(".")[0] == name for each in names.values())
            names[text] = f"{name}.{alike}" if alike else name
            shared[names[text]] = below(part, share)
        return {"$ref": f"#/$defs/{names[text]}"}

    count(schema)
    return {**below(schema, share), "$defs": shared}


def of_custom_resource(definition: dict[str, Any]) -> Schema:
    """Return the schema of the version that is stored, with its API version and kind as constants."""
    spec = definition["spec"]
    (version,) = [each for each in spec["versions"] if each["storage"]]
    schema: Schema = without_descriptions(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["apiVersion"] = {"const": f"{spec['group']}/{version['name']}"}
    schema["properties"]["kind"] = {"const": spec["names"]["kind"]}
    return with_shared_parts(schema)


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def main(name: str, file: str) -> None:
    """Print the schema, a definition a line."""
    origin = ORIGINS[name]
    document = yaml.load(Path(file).read_text(), yaml.CSafeLoader)
    schema = of_custom_resource(document) if "spec" in document else without_descriptions(document)
    definitions = {key: schema.pop(key) for key in ("$defs", "definitions") if key in schema}
    about = f"{origin.path} of https://github.com/{origin.repository} at {origin.version}, Apache License 2.0"
    lines = [f"{_text(key)}: {_text(value)}" for key, value in {"$comment": about, **schema}.items()]
    for key, parts in definitions.items():
        body = ",\n".join(f"  {_text(part)}: {_text(value)}" for part, value in parts.items())
        lines.append(f"{_text(key)}: {{\n{body}\n}}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(*sys.argv[1:])
