"""Barriers: in shared memory the ranks of one machine start an iteration within microseconds."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import RankTimeoutError
from vllm_efa_ep.world import World

CACHE_LINE_WORDS = 8
Barrier = Callable[[], object]


def make_barrier(bootstrap: Bootstrap, world: World, timeout_s: float) -> tuple[str, Barrier]:
    """Collective: return the best barrier of this world and its name.

    On one host it is ``shared memory``. Otherwise it is ``bootstrap``, which ranks leave within a round trip
    of its network, so that waiting for a late starter is part of a round.
    """
    if not world.single_host:
        return "bootstrap", lambda: bootstrap.all_gather(b"")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="efa_ep_bench_") as file:
        file.truncate(SharedBarrier.file_bytes(world.size))
        path = Path(bootstrap.all_gather(file.name.encode())[0].decode())
        barrier = SharedBarrier(path, world.rank, world.size, timeout_s)
        bootstrap.all_gather(b"")  # all have mapped it, so its name may go
    return "shared memory", barrier.wait


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
            RankTimeoutError: A rank did not come.

        """
        self._arrivals += 1
        self._words[self._own] = self._arrivals
        deadline = time.monotonic() + self._timeout_s
        for word in self._all:
            while self._words[word] < self._arrivals:
                os.sched_yield()
                if time.monotonic() > deadline:
                    rank = word // CACHE_LINE_WORDS
                    raise RankTimeoutError(
                        f"rank {rank} did not reach the barrier in {self._timeout_s:g} s",
                        "barrier",
                        0,
                        (rank,),
                    )
