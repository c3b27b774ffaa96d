"""What a rank has counted, as a file: ranks are processes of their own, and nobody can call into them."""

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vllm_efa_ep import _core
from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.stats import Stats

SECONDS_BETWEEN_WRITES = 0.25
logger = logging.getLogger(__name__)


class Counting(Protocol):
    """What is reported: ``AllToAll``, as far as it matters here."""

    @property
    def config(self) -> Any:
        """Its configuration, which has a layout."""

    def stats(self) -> Stats:
        """Return its totals."""


class SnapshotWriter:
    """Writes ``rank<r>.json`` four times a second, from a thread of its own, and once at the end.

    Ranks count from 0 in each stage of a pipeline; from the second one on it is ``rank<r>.stage<s>.json``.

    No half ever writes it: reading the counters takes microseconds, and a file may take milliseconds. A file
    that cannot be written is logged once and tried again each time.
    """

    def __init__(
        self, directory: str, rank: int, instances: Callable[[], Sequence[Counting]], stage: int = 0
    ) -> None:
        """Take the directory (empty: write nothing) and what returns the instances to report."""
        name = f"rank{rank}.stage{stage}.json" if stage else f"rank{rank}.json"
        self._path = Path(directory) / name if directory else None
        self._rank = rank
        self._instances = instances
        self._stop = threading.Event()
        self._warned = False
        self._thread: threading.Thread | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._run, name="efa_ep_snapshots", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write the last counters and end; safe to repeat."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_WRITES):
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            reported = [
                {"layout": each.config.layout} | dataclasses.asdict(each.stats())
                for each in self._instances()
            ]
        except EfaEpError:
            return  # an instance that failed has no counters any more; the file keeps the last ones
        content = {
            "rank": self._rank,
            "pid": os.getpid(),
            "duration_bounds": _core.duration_bounds(),
            "all_to_alls": reported,
        }
        text = json.dumps(content, indent=1, default=str)
        complete = self._path.with_suffix(".tmp")
        try:
            complete.write_text(text)
            complete.replace(self._path)  # readers see the old file or the new one, never a part
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "EFA EP: metrics of rank %d stand still: %s: %s", self._rank, self._path, error
                )
