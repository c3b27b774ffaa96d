"""Do all nodes have the same versions, devices and settings?"""

from collections import defaultdict

from vllm_efa_ep.doctor.check import Finding, Outcome, failed, ok

NAME = "same-on-all-nodes"
WHY = (
    "Ranks with different libfabrics, EFA drivers or vLLMs fail in a round (EFA's status 18, feature "
    "mismatch) or differ in speed and results without a word."
)
FIX = "Start all nodes from one machine image and one container image, with one environment."


def judge_agreement(nodes: list[list[Outcome]], hosts: list[str]) -> Finding:
    """Compare the facts of all nodes."""
    names = sorted({name for outcomes in nodes for outcome in outcomes for name in outcome.facts})
    differing = []
    for name in names:
        holders: dict[str, list[str]] = defaultdict(list)
        for host, outcomes in zip(hosts, nodes, strict=True):
            values = [outcome.facts[name] for outcome in outcomes if name in outcome.facts]
            holders[values[0] if values else "nothing"].append(host)
        if len(holders) > 1:
            differing.append(
                f"{name}: "
                + ", ".join(f"{value or 'unset'} on {' '.join(held)}" for value, held in holders.items())
            )
    if differing:
        return failed("; ".join(differing))
    return ok(f"{', '.join(names)}: the same on all {len(nodes)} nodes")
