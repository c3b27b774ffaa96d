"""Ranges on Nsight Systems' timeline, named like the halves they are of.

A range is the host's time in a half; Nsight relates the kernels that it started to it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError

Range = Callable[[str], AbstractContextManager[object]]
_NO_RANGE = nullcontext()


def range_maker(settings: Settings) -> Range:
    """Return what opens a range of a name: NVTX's if ``EFA_EP_NVTX`` is on, otherwise none.

    Raises:
        ConfigurationError: It is on, and torch has no CUDA.

    """
    if settings.nvtx == "off":
        return lambda _name: _NO_RANGE
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "EFA_EP_NVTX=on, but torch finds no CUDA, which NVTX comes with; unset it, or set EFA_EP_TRACE "
            "for a timeline without CUDA"
        )
    return torch.cuda.nvtx.range
