"""The text of docs/doctor.md."""

from vllm_efa_ep.doctor.checks import CHECKS
from vllm_efa_ep.doctor.cluster import agreement, pairs

_HEAD = """# Doctor

Generated from `vllm_efa_ep/doctor` by `vllm-efa-ep doctor --markdown`; do not edit.

One command before the first run: `vllm-efa-ep doctor`. On all nodes of a Ray cluster, once:
`vllm-efa-ep doctor --ray`. Without Ray, on every node `I` of `N`:
`vllm-efa-ep doctor --nodes N --node I --meet NODE0:29600 --token-file FILE`, where `FILE` has the same secret
on all nodes (`openssl rand -hex 32 > FILE`). These two also write between every pair of nodes.

`--require-efa` makes going without EFA a failure, and `--json` prints the same for machines. The exit status
is 0 if nothing failed, 1 if something did, and 2 if the command line cannot be understood.

## On each machine
"""


def markdown() -> str:
    """Return every check with its reason and its fix."""
    lines = [_HEAD]
    for check in CHECKS:
        lines += _section(check.name, check.why, check.fix)
    lines += ["## Between machines", ""]
    for module in (agreement, pairs):
        lines += _section(module.NAME, module.WHY, module.FIX)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, why: str, fix: str) -> list[str]:
    return [f"### {name}", "", why, "", f"Fix: {fix}", ""]
