"""Ranges on Nsight Systems' timeline, named like the halves they are of.

A range is the host's time in a half; Nsight relates the kernels that it started to it.
"""

from typing import Any, cast

import torch

from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.rank_memory import Halves

_HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


def require_cuda(settings: Settings) -> None:
    """Raise ``ConfigurationError`` if ``EFA_EP_NVTX`` is on and torch has no CUDA."""
    if settings.nvtx == "on" and not torch.cuda.is_available():
        raise ConfigurationError(
            "EFA_EP_NVTX=on, but torch finds no CUDA, which NVTX comes with; unset it, or set EFA_EP_TRACE "
            "for a timeline without CUDA"
        )


def with_ranges(halves: Halves) -> Halves:
    """Return the same halves, each a range."""
    return cast(Halves, _Ranged(halves))


class _Ranged:
    def __init__(self, halves: Halves) -> None:
        self._halves = halves

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._halves, name)
        return torch.cuda.nvtx.range(name)(method) if name in _HALVES else method
