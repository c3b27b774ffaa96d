"""A barrier in shared memory, so that the ranks of one machine start an iteration within microseconds."""

import mmap
import os
import time
from pathlib import Path

CACHE_LINE_WORDS = 8


class SharedBarrier:
    """Every rank counts its arrivals in a word of its own and yields until all words have caught up."""

    def __init__(self, path: Path, rank: int, world: int, timeout_s: float) -> None:
        """Map ``path``, a file of zeros of at least ``file_bytes(world)`` bytes."""
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), self.file_bytes(world))).cast("Q")
        self._own = rank * CACHE_LINE_WORDS
        self._all = range(0, world * CACHE_LINE_WORDS, CACHE_LINE_WORDS)
        self._timeout_s = timeout_s
        self._arrivals = 0

    @staticmethod
    def file_bytes(world: int) -> int:
        """Return the bytes of the file that ``world`` ranks share."""
        return world * CACHE_LINE_WORDS * 8

    def wait(self) -> None:
        """Return when all ranks have called it as often as this one.

        Raises:
            TimeoutError: A rank did not come.

        """
        self._arrivals += 1
        self._words[self._own] = self._arrivals
        deadline = time.monotonic() + self._timeout_s
        for word in self._all:
            while self._words[word] < self._arrivals:
                os.sched_yield()
                if time.monotonic() > deadline:
                    rank = word // CACHE_LINE_WORDS
                    raise TimeoutError(f"rank {rank} did not reach the barrier in {self._timeout_s:g} s")
