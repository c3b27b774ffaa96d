"""Counters of a worker process as a file, for whoever cannot call into the process."""

import dataclasses
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from vllm_efa_ep.all_to_all import AllToAll

_SECONDS_BETWEEN_WRITES = 0.02


class StatsFile:
    """Writes ``rank<r>.json`` with the counters of each ``AllToAll`` of a rank.

    The file is replaced as a whole, at most fifty times a second while rounds run, and once when they end.
    """

    def __init__(self, directory: str, rank: int, all_to_alls: Iterable[AllToAll]) -> None:
        """Take the directory (empty: write nothing) and a live view of the instances to report."""
        self._path = Path(directory) / f"rank{rank}.json" if directory else None
        self._rank = rank
        self._all_to_alls = all_to_alls
        self._next_write = 0.0

    def write_if_due(self) -> None:
        """Write the file unless it was written just now."""
        if self._path is not None and time.monotonic() >= self._next_write:
            self.write()

    def write(self) -> None:
        """Write the file now."""
        if self._path is None:
            return
        self._next_write = time.monotonic() + _SECONDS_BETWEEN_WRITES
        content = {
            "rank": self._rank,
            "pid": os.getpid(),
            "all_to_alls": [
                {"layout": each.config.layout} | dataclasses.asdict(each.stats())
                for each in self._all_to_alls
            ],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        complete = self._path.with_suffix(".tmp")
        complete.write_text(json.dumps(content, indent=1, default=str))
        complete.replace(self._path)
