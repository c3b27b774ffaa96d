"""Result files of imaginary runs, for the tests of what reads them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_efa_ep.bench.measure import Timings
from vllm_efa_ep.bench.problem import Cell
from vllm_efa_ep.bench.results import SCHEMA, CellResult, Document, entry

HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
ENVIRONMENT: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": "vllm-efa-ep bench <script>alert(1)</script>",
    "versions": {"python": "3.11"},
    "host": {"cpu": "a processor", "cores": 8, "load_average": 0.0},
}


def document(rounds_us: dict[Cell, list[npt.NDArray[np.float64]]]) -> Document:
    """Return a run whose rounds took these times, one array per process start, all ranks alike."""
    results: list[CellResult] = []
    for cell, starts in rounds_us.items():
        for start, rounds in enumerate(starts):
            results.append(
                {
                    "cell": cell.to_json(),
                    "start": start,
                    "barrier": "shared memory",
                    "wire_floor_bytes": 1000.0 * cell.tokens,
                    "contestants": {
                        "ours": entry(cell, timings(rounds, HALVES), {"provider": "tcp"}),
                        "gloo_alltoall": entry(cell, timings(rounds * 3, ("dispatch", "combine")), {}),
                    },
                }
            )
    return {
        "schema": SCHEMA,
        "environment": ENVIRONMENT,
        "plan": {"effort": {"most": 100}, "seed": 1},
        "results": results,
    }


def timings(rounds_us: npt.NDArray[np.float64], steps: tuple[str, ...]) -> Timings:
    """Spread rounds evenly over their steps, on two ranks."""
    ns = np.repeat((rounds_us * 1000 / len(steps)).astype(np.int64)[:, None], len(steps), axis=1)
    per_round = {"writes": 2.0, "bytes_written": 1100.0} | {f"wait_{step}_s": 1e-6 for step in steps}
    return Timings(steps, np.stack([ns, ns]), per_round)
