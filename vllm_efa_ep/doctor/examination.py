"""Runs the checks on this machine, or with other nodes together."""

import json
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.check import Check, Finding, Outcome, Status, run_check, worst
from vllm_efa_ep.doctor.checks import CHECKS
from vllm_efa_ep.doctor.cluster import agreement, pairs
from vllm_efa_ep.doctor.hardware import meant_instead_of_efa
from vllm_efa_ep.doctor.system import System
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.world import host_identity

_NEEDED_FOR_EFA = ("efa-devices", "provider")


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        hosts: The name of each node.
        nodes: What each node found on itself, in the order of ``checks.CHECKS``.
        cluster: What the nodes found together; empty for one machine.
        links: Every pair of nodes.

    """

    hosts: list[str]
    nodes: list[list[Outcome]]
    cluster: list[Outcome] = field(default_factory=list)
    links: list[pairs.Link] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """The worst of all."""
        return worst(outcome.status for outcome in self.outcomes)

    @property
    def outcomes(self) -> list[Outcome]:
        """Every outcome of every node, then the cluster's."""
        return [outcome for node in self.nodes for outcome in node] + self.cluster

    def to_json(self) -> dict[str, Any]:
        """Return it for ``json``."""
        return {
            "status": self.status.value,
            "nodes": [
                {"host": host, "checks": [outcome.to_json() for outcome in outcomes]}
                for host, outcomes in zip(self.hosts, self.nodes, strict=True)
            ],
            "cluster": [outcome.to_json() for outcome in self.cluster],
            "links": [link.to_json() for link in self.links],
        }


def examine(
    system: System,
    checks: Iterable[Check] = CHECKS,
    efa_required: bool = False,
    begin: Callable[[str], None] = lambda _name: None,
) -> list[Outcome]:
    """Run the checks of one machine.

    Args:
        system: The machine.
        checks: Which.
        efa_required: Whether going without EFA is a failure, not a warning.
        begin: Is told the name of each check before it runs.

    """
    outcomes = []
    instead = meant_instead_of_efa(system)
    for check in checks:
        begin(check.name)
        outcome = run_check(check, system)
        without_efa = outcome.status is Status.WARNING or instead
        if efa_required and check.name in _NEEDED_FOR_EFA and without_efa:
            outcome = replace(outcome, status=Status.FAILED)
        outcomes.append(outcome)
    return outcomes


def examine_node(system: System, efa_required: bool, begin: Callable[[str], None]) -> Report:
    """Examine this machine alone."""
    return Report([socket.gethostname()], [examine(system, CHECKS, efa_required, begin)])


def examine_cluster(
    system: System, bootstrap: Bootstrap, timeout_s: float, efa_required: bool, begin: Callable[[str], None]
) -> Report:
    """Collective: examine all nodes, one rank each, and each pair of them; all return the same report.

    Args:
        system: This machine.
        bootstrap: Joins the nodes.
        timeout_s: How long a pair of nodes may take to write to each other.
        efa_required: Whether going without EFA is a failure, not a warning.
        begin: Is told the name of each check before it runs.

    """
    own = examine(system, CHECKS, efa_required, begin)
    message = {
        "host": socket.gethostname(),
        "identity": host_identity(),
        "checks": [each.to_json() for each in own],
    }
    begin(agreement.NAME)
    told = [json.loads(answer) for answer in bootstrap.all_gather(json.dumps(message).encode())]
    hosts = [answer["host"] for answer in told]
    nodes = [[Outcome.from_json(found) for found in answer["checks"]] for answer in told]
    one_host = len({answer["identity"] for answer in told}) == 1
    begin(pairs.NAME)
    links = pairs.measure_pairs(bootstrap, _settings(system), "lo" if one_host else "", timeout_s)
    cluster = [
        _outcome(agreement.NAME, agreement.WHY, agreement.FIX, agreement.judge_agreement(nodes, hosts)),
        _outcome(pairs.NAME, pairs.WHY, pairs.FIX, pairs.judge_pairs(links, hosts)),
    ]
    return Report(hosts, nodes, cluster, links)


def _outcome(name: str, why: str, fix: str, finding: Finding) -> Outcome:
    return Outcome(name, finding.status, finding.result, why, fix)


def _settings(system: System) -> Settings:
    try:
        return Settings.from_environment(system.environment)
    except ConfigurationError:
        return Settings()  # the check of the settings has said so; the links can be tried all the same
