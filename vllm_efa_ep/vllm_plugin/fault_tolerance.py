"""vLLM's fault-tolerance mode (``--enable-fault-tolerance``) with our backends.

vLLM keeps a list of the backends that can go on after a fault, and looks into it in each worker before there
is a communicator. What it calls later is in ``manager.py``: ``query_fault`` after a step, ``clean_buffers``
when an operator sends the command ``retry``.
"""

import functools
import sys
from typing import Any

from vllm_efa_ep.vllm_plugin import seams
from vllm_efa_ep.vllm_plugin.backend_names import BACKEND_NAMES, is_selected


def is_wanted(parallel_config: Any) -> bool:
    """Whether one of our backends is to survive faults."""
    return is_selected(parallel_config) and getattr(parallel_config, "enable_fault_tolerance", False)


def allow_our_backends() -> None:
    """Add them to vLLM's list; safe to repeat.

    Raises:
        VllmSeamError: The installed vLLM has no such list.

    """
    seams.require(seams.FAULT_TOLERANCE_SEAMS)
    from vllm.v1.worker.sentinel import gpu_worker_sentinel

    gpu_worker_sentinel.FT_BACKEND_SET |= set(BACKEND_NAMES)


def watch_for_workers() -> None:
    """Add them when a worker of this process is made, and wants it.

    Only in processes that have vLLM's workers imported when they load plugins: those that run one. To import
    the list would take every other process a second.
    """
    worker_base = sys.modules.get("vllm.v1.worker.worker_base")
    if worker_base is None:
        return
    original = worker_base.WorkerBase.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_wanted(self.parallel_config):
            allow_our_backends()

    worker_base.WorkerBase.__init__ = init
