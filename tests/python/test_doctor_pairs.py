"""Several nodes examine themselves and the links between them: real processes, real writes, over TCP."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_machines import good_machine
from reserved_port import reserved_port
from thread_world import DEADLINE_S, ThreadBootstrap, outcomes_of_ranks, run_ranks, settings_of

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.check import Status
from vllm_efa_ep.doctor.checks import CHECKS
from vllm_efa_ep.doctor.cluster.agreement import judge_agreement
from vllm_efa_ep.doctor.cluster.link import Endpoint
from vllm_efa_ep.doctor.cluster.meeting import Meeting
from vllm_efa_ep.doctor.cluster.pairs import Link, judge_pairs, measure_pairs, rounds_of_pairs
from vllm_efa_ep.doctor.examination import examine
from vllm_efa_ep.errors import ConfigurationError

_RUN = Run("doctor", bytes(32))
HOSTS = ["alpha", "beta", "gamma", "delta"]


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8, 33])
def test_every_pair_meets_once_and_nobody_is_in_two_places(nodes: int) -> None:
    """A measurement wants both ends to itself."""
    rounds = rounds_of_pairs(nodes)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == nodes * (nodes - 1) // 2


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_all_pairs_write(nodes: int) -> None:
    """Real writes in both directions, checked byte by byte at their target."""
    reports = run_ranks(nodes, lambda bootstrap: measure_pairs(bootstrap, settings_of(), "lo", DEADLINE_S))
    assert all(report == reports[0] for report in reports)
    assert len(reports[0]) == nodes * (nodes - 1) // 2
    for link in reports[0]:
        assert link.error == ""
        assert link.latency_s > 0
        assert link.bytes_per_second > 0
    assert judge_pairs(reports[0], HOSTS).status in (
        {Status.NOT_APPLICABLE} if nodes == 1 else {Status.OK, Status.WARNING}
    )


class Unreachable(Endpoint):
    """Node 1, whose writes go nowhere and to which none come, as behind a closed security group."""

    def measure(self, peer: int, *, session: int, starts: bool, timeout_s: float):  # type: ignore[no-untyped-def]
        """Answer nobody."""
        del peer, session, starts, timeout_s
        raise ConfigurationError("never sent")


class Impatient(Endpoint):
    """A node that does not wait for node 1 for as long as for the others."""

    def measure(self, peer: int, *, session: int, starts: bool, timeout_s: float):  # type: ignore[no-untyped-def]
        """Measure; with node 1, within half a second."""
        timeout_s = 0.5 if peer == 1 else timeout_s
        return super().measure(peer, session=session, starts=starts, timeout_s=timeout_s)


def test_a_node_that_nobody_reaches_is_named_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The security group blocks node 1: its pairs fail before the deadline, the third pair is measured."""

    def body(bootstrap: ThreadBootstrap) -> list[Link]:
        return measure_pairs(bootstrap, settings_of(), "lo", DEADLINE_S)

    def make(settings: Settings, interface: str, peers: int) -> Endpoint:
        rank = int(threading.current_thread().name.split()[-1])
        return (Unreachable if rank == 1 else Impatient)(settings, interface, peers)

    monkeypatch.setattr("vllm_efa_ep.doctor.cluster.pairs.Endpoint", make)
    links = {link.nodes: link for link in run_ranks(3, body)[0]}
    working = {nodes for nodes, link in links.items() if not link.error}
    assert {frozenset(nodes) for nodes in working} == {frozenset({0, 2})}
    finding = judge_pairs(list(links.values()), HOSTS)
    assert finding.status is Status.FAILED
    assert "2 of 3 pairs" in finding.result
    assert "1 (beta)" in finding.result
    assert "did not answer within 500 ms" in finding.result


def test_a_node_without_a_network_stops_nobody() -> None:
    """It says why, and so do all of its pairs."""

    def body(bootstrap: ThreadBootstrap) -> list[Link]:
        provider = "efa" if bootstrap.rank == 2 else "tcp"
        return measure_pairs(bootstrap, settings_of(provider=provider), "lo", DEADLINE_S)

    links = {frozenset(link.nodes): link for link in run_ranks(3, body)[0]}
    assert links[frozenset({0, 1})].error == ""
    for other in (0, 1):
        assert 'EFA_EP_PROVIDER is "efa"' in links[frozenset({other, 2})].error


def test_slow_links_are_named() -> None:
    """One pair at a third of the others' rate."""
    rate = 40e9
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    links = [Link(pair, 20e-6, rate / 3 if pair == (1, 3) else rate) for pair in pairs]
    finding = judge_pairs(links, HOSTS)
    assert finding.status is Status.WARNING
    assert "1 (beta) - 3 (delta) 13.33 GB/s" in finding.result
    assert judge_pairs([replace(link, bytes_per_second=rate) for link in links], HOSTS).status is Status.OK


def test_mixed_versions_are_named(tmp_path: Path) -> None:
    """One node of three with another EFA driver and another vLLM."""
    nodes = []
    for number in range(3):
        machine = good_machine("p5en", tmp_path / str(number))
        if number == 1:
            machine.write("/sys/module/efa/version", "2.17.3g")
            machine.finds("vllm", version="0.32.0", plugin=True, problems=[])
        machine.environment["EFA_EP_INTERFACE"] = f"eth{len(nodes)}"  # a host's own affair
        nodes.append(examine(machine.system, CHECKS))
    finding = judge_agreement(nodes, HOSTS[:3])
    assert finding.status is Status.FAILED
    assert "EFA driver: 3.3.0g on alpha gamma, 2.17.3g on beta" in finding.result
    assert "vLLM: 0.33.0 on alpha gamma, 0.32.0 on beta" in finding.result
    assert "libfabric" not in finding.result
    assert judge_agreement([nodes[0], nodes[2]], ["alpha", "gamma"]).status is Status.OK


def test_nodes_meet_without_ray() -> None:
    """What each says reaches all, in order; node 0, which has the store, leaves last."""
    payloads = [bytes([node]) * 1000 for node in range(3)]
    with reserved_port() as port:

        def body(threads: Bootstrap) -> list[bytes]:
            with Meeting("127.0.0.1", port, threads.rank, 3, _RUN, timeout_s=DEADLINE_S) as meeting:
                return meeting.bootstrap.all_gather(payloads[threads.rank])

        assert run_ranks(3, body) == [payloads] * 3


def test_a_node_that_does_not_come_is_an_error_with_a_remedy() -> None:
    """Within the deadline, not for ever."""
    with reserved_port() as port:
        ended = outcomes_of_ranks(1, lambda _: Meeting("127.0.0.1", port, 0, 2, _RUN, timeout_s=1.0))
    assert isinstance(ended[0].error, ConfigurationError)
    assert "--node 0 to 1" in str(ended[0].error)
