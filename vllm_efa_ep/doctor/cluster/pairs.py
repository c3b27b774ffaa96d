"""Every node writes to every other node, two by two."""

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.check import Finding, failed, not_applicable, ok, warning
from vllm_efa_ep.doctor.cluster.link import Endpoint
from vllm_efa_ep.errors import EfaEpError

NAME = "pair-writes"
WHY = (
    "A security group that does not allow all traffic from and to itself blocks EFA in silence: ssh "
    "and TCP work, and the first round hangs. This writes for real, both ways, between every pair of "
    "nodes."
)
FIX = (
    "Put all nodes into one subnet and one security group SG that allows all traffic from and to "
    "itself: `aws ec2 authorize-security-group-ingress --group-id $SG --ip-permissions "
    "'IpProtocol=-1,UserIdGroupPairs=[{GroupId='$SG'}]'`, the same with "
    "`authorize-security-group-egress`. A node that fails with all others is itself the trouble."
)
_SLOW = 0.5  # of the median link


@dataclass(frozen=True)
class Link:
    """What one pair of nodes found.

    Attributes:
        nodes: Both.
        latency_s: Half of the median round trip, seconds.
        bytes_per_second: In each direction, the lesser of what the two saw.
        error: Why it does not work, empty if it does.

    """

    nodes: tuple[int, int]
    latency_s: float = 0.0
    bytes_per_second: float = 0.0
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it for ``json``."""
        return asdict(self)


def rounds_of_pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds in which every node has at most one partner, and after which it has had each other."""
    seats: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = [
            (a, b) for a, b in zip(seats, reversed(seats), strict=True) if a is not None and b is not None
        ]
        rounds.append([(a, b) for a, b in pairs[: len(pairs) // 2]])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_pairs(bootstrap: Bootstrap, settings: Settings, interface: str, timeout_s: float) -> list[Link]:
    """Collective: measure every pair of nodes; the result is the same on all.

    Args:
        bootstrap: Joins the nodes, one rank each.
        settings: How to open the network.
        interface: The interface for TCP where ``settings`` name none.
        timeout_s: How long one pair may take.

    """
    endpoint, refusal = None, ""
    try:
        endpoint = Endpoint(settings, interface, peers=bootstrap.world_size - 1)
        address = endpoint.address
    except EfaEpError as error:
        address, refusal = b"", str(error)
    addresses = bootstrap.all_gather(address)
    refusals = {} if endpoint is None else _connect(endpoint, bootstrap.rank, addresses)
    bootstrap.all_gather(b"")  # nobody writes before every target knows every initiator
    links: dict[tuple[int, int], list[Link]] = {}
    for session, pairs in enumerate(rounds_of_pairs(bootstrap.world_size), start=1):
        own = [pair for pair in pairs if bootstrap.rank in pair]
        found = []
        for pair in own:
            peer = pair[1] if pair[0] == bootstrap.rank else pair[0]
            if endpoint is None or peer in refusals:
                found.append(Link(pair, error=refusal or refusals[peer]))
            else:
                found.append(_measure(endpoint, bootstrap.rank, pair, session, timeout_s))
        told = bootstrap.all_gather(json.dumps([link.to_json() for link in found]).encode())
        for link in (Link(**each) for answer in told for each in json.loads(answer)):
            links.setdefault((link.nodes[0], link.nodes[1]), []).append(link)
    return [_both_ends(pair, ends) for pair, ends in sorted(links.items())]


def _connect(endpoint: Endpoint, rank: int, addresses: list[bytes]) -> dict[int, str]:
    refusals = {}
    for peer, address in enumerate(addresses):
        if peer == rank:
            continue
        if not address:
            refusals[peer] = f"node {peer} has no network"
            continue
        try:
            endpoint.connect(peer, address)
        except EfaEpError as error:
            refusals[peer] = str(error)
    return refusals


def _measure(endpoint: Endpoint, rank: int, pair: tuple[int, int], session: int, timeout_s: float) -> Link:
    peer = pair[1] if pair[0] == rank else pair[0]
    try:
        times = endpoint.measure(peer, session=session, starts=rank == pair[0], timeout_s=timeout_s)
    except EfaEpError as error:
        return Link(pair, error=f"node {rank}: {error}")
    return Link(pair, times.latency_s, times.bytes_per_second)


def _both_ends(pair: tuple[int, int], ends: list[Link]) -> Link:
    errors = [link.error for link in ends if link.error]
    if errors:
        return Link(pair, error="; ".join(dict.fromkeys(errors)))
    return Link(pair, max(link.latency_s for link in ends), min(link.bytes_per_second for link in ends))


def judge_pairs(links: list[Link], hosts: list[str]) -> Finding:
    """Say what the links mean: which pairs do not work, and which are much slower than the others."""
    if not links:
        return not_applicable("one node")
    broken = [link for link in links if link.error]
    if broken:
        named = "; ".join(f"{_named(link, hosts)}: {link.error}" for link in broken[:4])
        return failed(f"{len(broken)} of {len(links)} pairs of nodes cannot write to each other: {named}")
    median = statistics.median(link.bytes_per_second for link in links)
    latency = statistics.median(link.latency_s for link in links)
    found = (
        f"all {len(links)} pairs write to each other both ways: median {latency * 1e6:.1f} us one way, "
        f"{median / 1e9:.2f} GB/s each way"
    )
    slow = [link for link in links if link.bytes_per_second < _SLOW * median]
    if slow:
        named = "; ".join(
            f"{_named(link, hosts)} {link.bytes_per_second / 1e9:.2f} GB/s" for link in slow[:4]
        )
        return warning(f"{found}; less than half of that: {named}")
    return ok(found)


def _named(link: Link, hosts: list[str]) -> str:
    return " - ".join(f"{node} ({hosts[node]})" for node in link.nodes)
