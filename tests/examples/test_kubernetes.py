"""The manifests are what Kubernetes and the operators accept, and no pod has a privilege."""

import copy
import json
import os
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_files import EXAMPLES, RunTool
from manifests import PodTemplate, image_file, objects, pods
from operator_schemas import OF_KIND, SCHEMAS, validator
from reduce_schema import ORIGINS
from reduce_schema import main as reduce_schema

from vllm_efa_ep.doctor.instances import INSTANCES

KUBERNETES = "1.34"  # of cluster.yaml
CRDS = os.environ.get("CRDS", "")
PODS = pods()
SERVING = [pod for pod in PODS if "nodeSelector" in pod.spec]


def cluster() -> dict[str, Any]:
    """Return eksctl's configuration."""
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "eks" / "cluster.yaml").read_text())
    return found


def operated() -> list[dict[str, Any]]:
    """Return what an operator or eksctl reads, not Kubernetes itself."""
    return [item for _, item in objects() if item["kind"] in OF_KIND] + [cluster()]


def refused(run_tool: RunTool, directory: Path, found: list[dict[str, Any]]) -> str:
    """Return what Kubernetes' own schemas have against objects, or an empty string."""
    paths = []
    for number, item in enumerate(found):
        paths.append(directory / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(item))
    result = run_tool("kubernetes-validate", "--strict", "-k", KUBERNETES, *paths)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def test_kubernetes_accepts_every_object_and_pod(run_tool: RunTool, tmp_path: Path) -> None:
    """Strictly: no field that it does not know. Of custom resources the pods are tried, and the metadata."""
    built_in = [item for _, item in objects() if item["kind"] not in OF_KIND]
    assert {"Service", "Job", "Deployment"} <= {item["kind"] for item in built_in}
    metadata = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": item["metadata"]}
        for _, item in objects()
        if item["kind"] in OF_KIND
    ]
    assert refused(run_tool, tmp_path, [*built_in, *metadata, *(pod.as_pod() for pod in PODS)]) == ""


def test_kubernetes_refuses_a_misspelt_field(run_tool: RunTool, tmp_path: Path) -> None:
    """Protects the test above against a tool that accepts all."""
    pod = copy.deepcopy(PODS[0].as_pod())
    pod["spec"]["containers"][0]["securityContexts"] = {}
    assert "securityContexts" in refused(run_tool, tmp_path, [pod])


def test_the_operators_accept_their_objects() -> None:
    """LeaderWorkerSet, KubeRay and eksctl, by what they publish, pods included."""
    found = operated()
    assert {item["kind"] for item in found} == set(OF_KIND)
    for item in found:
        assert [error.message for error in validator(item["kind"]).iter_errors(item)] == []


def test_the_operators_know_every_field() -> None:
    """One more field, in any place, is refused, but where its name is the user's own.

    Protects the test above against schemas that accept all: Kubernetes drops what it does not know.
    """
    free = set()
    for item in operated():
        known = validator(item["kind"])
        for place in mappings(item):
            changed = copy.deepcopy(item)
            reduce(getitem, place, changed)["unknownField"] = "1"
            if known.is_valid(changed):
                free.add(place[-1])
    assert free == {"labels", "limits", "metadata", "nodeSelector", "rayStartParams", "requests"}


def mappings(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every mapping, as the keys that lead there."""
    if isinstance(value, dict):
        yield place
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield from mappings(below, (*place, key))


def test_a_page_installs_the_operators_that_the_schemas_are_of() -> None:
    """Another version may take other fields."""
    page = (EXAMPLES / "eks" / "README.md").read_text()
    assert f"/lws --version {ORIGINS['leaderworkerset'].version.removeprefix('v')} " in page
    assert f"/kuberay-operator --version {ORIGINS['rayjob'].version.removeprefix('v')}\n" in page
    for name, origin in ORIGINS.items():
        about = json.loads((SCHEMAS / f"{name}.json").read_text())["$comment"]
        assert all(each in about for each in origin)


@pytest.mark.skipif(not CRDS, reason="CRDS names no directory with the operators' own definitions")
@pytest.mark.parametrize("name", ORIGINS)
def test_the_schemas_are_reduced_from_the_definitions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``CRDS=DIR make test-examples``, where DIR has the files of ``ORIGINS``."""
    reduce_schema(name, str(Path(CRDS) / Path(ORIGINS[name].path).name))
    assert capsys.readouterr().out == (SCHEMAS / f"{name}.json").read_text()


def test_kuberay_accepts_a_cluster_with_a_token() -> None:
    """It refuses one whose version of Ray it is not told, or is before 2.52, beside what schemas can say.

    https://github.com/ray-project/kuberay/blob/v1.7.0/ray-operator/controllers/ray/utils/validation.go
    """
    clusters = [item["spec"]["rayClusterSpec"] for item in operated() if item["kind"] == "RayJob"]
    (in_image,) = re.findall(r"ray\[default\]==([\d.]+)", image_file().read_text())
    assert clusters
    for spec in clusters:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == in_image
        assert tuple(map(int, in_image.split("."))) >= (2, 52, 0)


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


def test_what_runs_on_the_nodes_tolerates_their_taints() -> None:
    """The pods, and the device plugins without which the nodes have neither GPUs nor EFA devices to give.

    NVIDIA's chart tolerates its own taint, and asks for a label where nobody discovers features.
    """
    plugin = yaml.safe_load((EXAMPLES / "eks" / "efa-device-plugin.yaml").read_text())
    (key,) = plugin["supportedInstanceLabels"]["keys"]
    assert set(plugin["supportedInstanceLabels"]["values"]) == set(INSTANCES)
    for group in (each for each in cluster()["managedNodeGroups"] if each.get("efaEnabled")):
        assert group["labels"]["nvidia.com/gpu.present"] == "true"
        for taint in group["taints"]:
            tolerated = {"key": taint["key"], "operator": "Exists", "effect": taint["effect"]}
            assert tolerated in plugin["tolerations"]
            assert all(
                tolerated in pod.spec["tolerations"] for pod in SERVING if key in pod.spec["nodeSelector"]
            )


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
