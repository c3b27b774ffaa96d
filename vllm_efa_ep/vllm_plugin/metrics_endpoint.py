"""Our metrics on vLLM's own /metrics.

Ranks are worker processes; /metrics is served by one or several API servers. Ranks write snapshots into the
directory ``EFA_EP_STATS_DIR``, which is chosen before any of these processes starts and inherited by all, and
an API server reads them at each scrape.

One API server shows prometheus_client's registry, to which a collector can be added. Several use its
multiprocess mode: each scrape then builds a registry of its own around a ``MultiProcessCollector``, which
merges files that metric objects have written. A histogram that was counted elsewhere cannot be put into such
an object, so our collector speaks after that one. Neither way touches vLLM.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_VARIABLE = "EFA_EP_STATS_DIR"
_exposed = False


def expose() -> None:
    """Show the metrics of all ranks where this process shows metrics; safe to repeat.

    Without ``EFA_EP_STATS_DIR`` in the environment, choose a directory for all processes started from here.
    """
    global _exposed
    if not os.environ.get(_VARIABLE):
        directory = tempfile.mkdtemp(prefix="efa_ep_stats_")
        os.environ[_VARIABLE] = directory
        atexit.register(_remove, directory, os.getpid())
    if _exposed:
        return
    _exposed = True
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    from vllm_efa_ep.metrics.collector import RankCollector

    ranks = RankCollector(Path(os.environ[_VARIABLE]))
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        REGISTRY.register(ranks)
        return
    original = MultiProcessCollector.collect

    @functools.wraps(original)
    def collect(self: Any) -> Any:
        return [*original(self), *ranks.collect()]  # type: ignore[no-untyped-call]

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]


def _remove(directory: str, creator: int) -> None:
    if os.getpid() == creator:  # a forked child inherits the handler, but not the directory
        shutil.rmtree(directory, ignore_errors=True)
