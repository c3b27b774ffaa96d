"""Expert-parallel all-to-all for mixture-of-experts models on AWS EFA, and a vLLM plugin that uses it.

``AllToAll`` is the public API; it needs PyTorch only. vLLM finds ``vllm_efa_ep.vllm_plugin`` by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_efa_ep.all_to_all import AllToAll, Handle
    from vllm_efa_ep.all_to_all_config import AllToAllConfig
    from vllm_efa_ep.dispatched import Dispatched
    from vllm_efa_ep.memory_plan import MemoryPlan
    from vllm_efa_ep.stats import Stats

__all__ = ["AllToAll", "AllToAllConfig", "Dispatched", "Handle", "MemoryPlan", "Stats"]
__version__ = "0.1.0"

# Loaded on first use: vLLM imports this package in every one of its processes, most of which never use it.
_HOMES = {
    "AllToAll": "all_to_all",
    "AllToAllConfig": "all_to_all_config",
    "Dispatched": "dispatched",
    "Handle": "all_to_all",
    "MemoryPlan": "memory_plan",
    "Stats": "stats",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name.

    ``__cuda__``: the GPUs this build has kernels for, ``("sm_90a", ...)``; empty for a build for CPUs.
    """
    if name == "__cuda__":
        architectures: str = import_module(f"{__name__}._core").cuda_architectures
        return tuple(filter(None, architectures.split(",")))
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
