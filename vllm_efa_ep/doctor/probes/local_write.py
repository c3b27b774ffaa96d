"""Two endpoints of this machine write to each other, as ranks on two nodes do."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.cluster.link import Endpoint
from vllm_efa_ep.errors import EfaEpError

_SECONDS = 20.0


def probe() -> dict[str, Any]:
    """Measure."""
    try:
        ends = [Endpoint(Settings.from_environment(), interface="lo", peers=1) for _ in range(2)]
        for number, end in enumerate(ends):
            end.connect(1 - number, ends[1 - number].address)
        with ThreadPoolExecutor(2) as pool:
            measuring = [
                pool.submit(end.measure, 1 - number, session=1, starts=number == 0, timeout_s=_SECONDS)
                for number, end in enumerate(ends)
            ]
            measured = [each.result() for each in measuring]
    except EfaEpError as error:
        return {"error": str(error)}
    return {"latency_s": measured[0].latency_s, "bytes_per_second": min(m.bytes_per_second for m in measured)}


if __name__ == "__main__":
    print(json.dumps(probe()))
