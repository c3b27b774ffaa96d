"""The services of the manifests reach the pods that they mean, under names that nobody else takes."""

import re
from collections.abc import Iterator
from typing import Any

from manifests import objects

ITEMS = [item for _, item in objects()]
SERVICES = {item["metadata"]["name"]: item["spec"] for item in ITEMS if item["kind"] == "Service"}


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every template of a pod, with its labels."""
    if isinstance(value, dict) and "containers" in value.get("spec", {}):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from templates(below)


def test_every_service_reaches_pods() -> None:
    """Some have all of its labels, and each of those listens at its ports, if the service forwards any."""
    assert len(SERVICES) >= 5
    for name, service in SERVICES.items():
        wanted = service["selector"].items()
        found = [each for each in templates(ITEMS) if wanted <= each["metadata"].get("labels", {}).items()]
        assert found, f"nobody is behind {name}"
        if service.get("clusterIP") == "None":
            continue  # only gives pods their names
        for pod in found:
            ports = {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", [])}
            assert {port["targetPort"] for port in service["ports"]} <= ports, name


def test_no_service_takes_a_name_that_an_operator_needs() -> None:
    """A LeaderWorkerSet makes a headless service of its own name unless there is one; its pods meet by it.

    https://github.com/kubernetes-sigs/lws/blob/v0.10.0/pkg/utils/controller/controller_utils.go
    """
    sets = {item["metadata"]["name"] for item in ITEMS if item["kind"] == "LeaderWorkerSet"}
    assert sets
    assert not sets & SERVICES.keys()


def test_services_put_nothing_into_the_environment_of_pods() -> None:
    """A service named ``efa-ep`` would give them EFA_EP_PORT, which is no setting: no rank would start."""
    pods = list(templates(ITEMS))
    assert len(pods) >= 7
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods)


def test_every_address_in_a_command_is_a_services() -> None:
    """At a port that it has."""
    commands = [
        word
        for template in templates(ITEMS)
        for container in template["spec"]["containers"]
        for word in container.get("args", [])
    ]
    addresses = re.findall(r"https?://([\w-]+):(\d+)", " ".join(commands))
    assert len(addresses) == 2
    for name, port in addresses:
        assert int(port) in {each["port"] for each in SERVICES[name]["ports"]}
