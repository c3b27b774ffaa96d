"""What to do after an examination."""

from vllm_efa_ep.doctor.check import Status
from vllm_efa_ep.doctor.examination import Report


def next_steps(report: Report) -> list[str]:
    """Return what to do, the first thing first."""
    failures = list(dict.fromkeys(each.name for each in report.outcomes if each.status is Status.FAILED))
    if failures:
        others = f", then {', '.join(failures[1:])}" if failures[1:] else ""
        return [f"Mend {failures[0]} as its fix says{others}.", "Run `vllm-efa-ep doctor` again."]
    if any(each.name == "efa-devices" and each.status is Status.WARNING for each in report.outcomes):
        return [
            "Here: try it on CPUs over TCP with `make demo`, or serve your own model (README.md).",
            "For speed: start p5en or p6 nodes with EFA (examples/eks, examples/parallelcluster) and run "
            "`vllm-efa-ep doctor --require-efa` there.",
        ]
    if len(report.nodes) == 1:
        return [
            "Run it on all nodes, so that each pair of them is tried: `vllm-efa-ep doctor --ray` on Ray, or "
            "on every node `vllm-efa-ep doctor --nodes N --node I --meet NODE0:29600 --token-file FILE`.",
        ]
    return [
        "Serve: `vllm serve MODEL --enable-expert-parallel --all2all-backend efa_ep_low_latency` with the "
        "options of examples/.",
        "Afterwards compare /sys/class/infiniband/*/ports/1/hw_counters/rdma_write_bytes: it must have grown "
        "on every node.",
    ]
