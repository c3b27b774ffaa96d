"""The names by which a user selects this package in vLLM."""

from typing import Any, Final

HIGH_THROUGHPUT: Final = "efa_ep_high_throughput"
"""Standard activation format: ``[rows, hidden]`` with ids and weights per row."""

LOW_LATENCY: Final = "efa_ep_low_latency"
"""BatchedExperts activation format: ``[local experts, capacity, hidden]``."""

BACKEND_NAMES: Final = (HIGH_THROUGHPUT, LOW_LATENCY)
"""Our values of ``--all2all-backend``."""


def backend_name(setting: str) -> str:
    """Return the backend of a value of ``EFA_EP_BACKEND``, or an empty string for an empty one."""
    return f"efa_ep_{setting}" if setting else ""


def is_selected(parallel_config: Any) -> bool:
    """Return whether a ``ParallelConfig`` or ``FusedMoEParallelConfig`` names one of our backends."""
    return parallel_config.all2all_backend in BACKEND_NAMES
