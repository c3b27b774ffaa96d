"""Our metrics on vLLM's own /metrics.

Ranks are worker processes; /metrics is served by one or several API servers. Ranks write snapshots into the
directory ``EFA_EP_STATS_DIR``, which is chosen before any of these processes starts and inherited by all, and
an API server reads them at each scrape. This works with one API server and with several, where vLLM collects
its own metrics through PROMETHEUS_MULTIPROC_DIR: that mode knows no collectors but its own, and its files
have no way to set the buckets of a histogram that was counted elsewhere.
"""

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakSet

from vllm_efa_ep.vllm_plugin import logger, seams

_VARIABLE = "EFA_EP_STATS_DIR"
_extended: "WeakSet[Any]" = WeakSet()


def choose_directory() -> None:
    """Let the processes that are started from here write snapshots; keeps a directory that was chosen."""
    if os.environ.get(_VARIABLE):
        return
    directory = tempfile.mkdtemp(prefix="efa_ep_stats_")
    os.environ[_VARIABLE] = directory
    atexit.register(_remove, directory, os.getpid())


def apply() -> None:
    """Extend the registry that vLLM shows; call once per process."""
    problems = seams.problems(seams.METRICS_SEAMS)
    if problems:  # serving works without; whoever did not ask for us need not hear about it
        level = logging.WARNING if os.environ.get(_VARIABLE) else logging.DEBUG
        logger.log(level, "no EFA EP metrics on /metrics with this vLLM: %s", "; ".join(problems))
        return
    import vllm.v1.metrics.prometheus as prometheus

    original = prometheus.get_prometheus_registry

    @functools.wraps(original)
    def get_prometheus_registry() -> Any:
        registry = original()
        directory = os.environ.get(_VARIABLE)
        if directory and registry not in _extended:
            from vllm_efa_ep.metrics.collector import RankCollector

            registry.register(RankCollector(Path(directory)))
            _extended.add(registry)
        return registry

    prometheus.get_prometheus_registry = get_prometheus_registry
    # The module of the route imports the function by name, and may have done so already.
    route = sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")
    if route is not None:
        route.get_prometheus_registry = get_prometheus_registry  # type: ignore[attr-defined]


def _remove(directory: str, creator: int) -> None:
    if os.getpid() == creator:  # a forked child inherits the handler, but not the directory
        shutil.rmtree(directory, ignore_errors=True)
