"""``local-write``: do RDMA writes work between two endpoints of this machine?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    probe = system.probe("local_write")
    if "error" in probe:
        return failed(probe["error"])
    return ok(
        f"two endpoints wrote to each other: {probe['latency_s'] * 1e6:.1f} us one way, "
        f"{probe['bytes_per_second'] / 1e9:.2f} GB/s each way at once"
    )


CHECK = Check(
    name="local-write",
    why=(
        "Opening the provider, registering memory, writing and completing is the whole path, before a "
        "network is in it."
    ),
    fix=(
        "Mend the other findings first. Then look at `FI_LOG_LEVEL=info vllm-efa-ep doctor` and, on "
        "EFA, at `/opt/amazon/efa/bin/fi_pingpong -p efa`."
    ),
    examine=_examine,
)
