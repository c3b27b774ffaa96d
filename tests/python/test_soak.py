"""Worlds that live long: real processes, shared memory and libfabric, one ``AllToAll`` after another.

Thousands of rounds with random routing on two channels, all results checked. Between two lives every rank
counts what it holds, and at the end of each the counters of all ranks must agree. ``make soak`` takes
SOAK_SECONDS (default 600); the short form runs in every test run.
"""

import ctypes
import gc
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from process_world import ProcessWorld, Rank
from thread_world import DEADLINE_S, settings_of, until

from vllm_efa_ep import AllToAll, AllToAllConfig, Stats

_SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
_SEED = int(os.environ.get("TEST_SEED", "17"))
_CONFIG = AllToAllConfig(
    64, 12, 3, 24, dtype=torch.float32, combine_dtype=torch.float32, channels=2, layout="per_token"
)
_WARM_UP_LIVES = 2
# libfabric keeps a few KB per connection that was ever made (tests/cpp/lsan.supp says which).
_HEAP_KB_PER_LIFE = 96


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h; bytes, summed over all of malloc's arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"),
            *("fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _Mallinfo


@dataclass(frozen=True)
class Holdings:
    """What a process holds.

    The heap is what malloc has handed out and not got back: the resident set would add pages of files,
    fragments and pools of Python's that come and go by the megabyte, and hide a leak among them.
    """

    descriptors: int
    threads: int
    arenas: int
    heap_kb: int
    python_objects: int

    @classmethod
    def now(cls, most_threads: float) -> "Holdings":
        """Count this process's. One with more threads than expected gets time: some may be about to end."""
        gc.collect()
        until(lambda: _threads() <= most_threads, deadline_s=30.0)
        heap = _libc.mallinfo2()
        return cls(
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            threads=_threads(),
            arenas=Path("/proc/self/maps").read_text().count("efa_ep_arena"),
            heap_kb=(heap.uordblks + heap.hblkhd) // 1024,
            python_objects=sys.getallocatedblocks(),
        )


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@dataclass(frozen=True)
class Life:
    """One ``AllToAll``: its last counters, and what the rank held after it was closed."""

    stats: Stats
    after: Holdings


class _Round:
    """One rank's part in one round of one channel. Whole numbers in float32, so that every sum is exact."""

    def __init__(self, all_to_all: AllToAll, channel: int, seed: int) -> None:
        self._all_to_all = all_to_all
        random = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(0, _CONFIG.max_tokens_per_rank + 1, (), generator=random))
        ids = torch.randint(-1, _CONFIG.num_experts, (tokens, _CONFIG.top_k), generator=random)
        self._x = torch.randint(-99, 99, (tokens, _CONFIG.hidden_size), generator=random).float()
        self._weights = torch.randint(1, 9, ids.shape, generator=random).float()
        self._expected = self._x * (self._weights * (ids >= 0)).sum(dim=1, keepdim=True)
        self._in_place = seed % 2 == 0
        x = self._x
        if self._in_place:
            x = all_to_all.activations(channel)[:tokens]
            x.copy_(self._x)
        self._handle = all_to_all.dispatch_send(x, ids, self._weights, channel=channel)

    def compute(self) -> None:
        """Receive, let every expert return its input, and send the weighted sums of this rank's."""
        got = self._all_to_all.dispatch_recv(self._handle)
        assert got.topk_ids is not None
        assert got.topk_weights is not None
        own = torch.isin(got.topk_ids, torch.tensor(self._all_to_all.local_experts))
        result = got.x * (got.topk_weights * own).sum(dim=1, keepdim=True)
        if self._in_place:
            result = self._all_to_all.expert_output(self._handle).copy_(result)
        self._all_to_all.combine_send(result, self._handle)

    def finish(self) -> None:
        """Compare the result."""
        assert torch.equal(self._all_to_all.combine_recv(self._handle), self._expected)


def _live(rank: Rank, ranks_per_node: int, number: int, rounds: int, most_threads: float) -> Life:
    bootstrap = rank.bootstrap
    settings = settings_of(ranks_per_node, nics_per_rank=2, chunk_bytes=700)
    with AllToAll(_CONFIG, bootstrap, settings) as all_to_all:
        for turn in range(rounds):
            seed = hash((_SEED, number, turn, bootstrap.rank)) % 2**40
            # The halves of both channels in the same order on all ranks.
            playing = [_Round(all_to_all, channel, 2 * seed + turn % 2 + channel) for channel in (0, 1)]
            for each in playing:
                each.compute()
            for each in playing:
                each.finish()
        bootstrap.all_gather(b"")  # all have all results
        all_to_all.drain()
        stats = all_to_all.stats()
    bootstrap.all_gather(b"")  # all have closed
    return Life(stats, Holdings.now(most_threads))


def _soak(rank: Rank, ranks_per_node: int, lives: int, rounds: int, seconds: float) -> list[Life]:
    """Live at least ``lives`` lives of ``rounds`` rounds, and for ``seconds``."""
    end = time.monotonic() + seconds
    lived: list[Life] = []
    while True:
        most_threads = min((life.after.threads for life in lived[_WARM_UP_LIVES - 1 :]), default=math.inf)
        lived.append(_live(rank, ranks_per_node, len(lived), rounds, most_threads))
        done = len(lived) >= lives and time.monotonic() > end
        if rank.bootstrap.all_gather(str(done).encode())[0] == b"True":
            return lived


@pytest.mark.parametrize(
    ("lives", "rounds", "seconds"),
    [
        pytest.param(8, 100, 0.0, id="short"),
        pytest.param(8, 1000, _SECONDS, id="long", marks=pytest.mark.long),
    ],
)
def test_long_lives_leave_nothing_behind(lives: int, rounds: int, seconds: float) -> None:
    """Descriptors, threads and shared memory stay as they were, memory flat, and no write is lost."""
    print(f"TEST_SEED={_SEED}")
    size, ranks_per_node = 4, 2
    with ProcessWorld(size, _soak, ranks_per_node, lives, rounds, seconds) as world:
        ended = [world.ended(rank, seconds + 4 * DEADLINE_S) for rank in range(size)]
        for rank, end in enumerate(ended):
            assert end.error is None, f"rank {rank}: {end.error}: {end.message}"
        assert world.exit_codes(list(range(size))) == [0] * size
    by_rank: list[list[Life]] = [end.value for end in ended]
    for rank, lived in enumerate(by_rank):
        _check_holdings(rank, [life.after for life in lived], 2 * rounds)
    for number, world_lives in enumerate(zip(*by_rank, strict=True)):
        _check_counters(number, [life.stats for life in world_lives], rounds)
    first, last = by_rank[0][_WARM_UP_LIVES - 1].after, by_rank[0][-1].after
    print(f"{len(by_rank[0])} lives of {2 * rounds} rounds; rank 0 held {first} and holds {last}")


def _check_holdings(rank: int, held: list[Holdings], rounds: int) -> None:
    before, after = held[_WARM_UP_LIVES - 1], held[-1]
    assert after.arenas == 0
    assert after.descriptors == before.descriptors, f"rank {rank}: {held}"
    assert after.threads <= before.threads, f"rank {rank}: {held}"
    lives = len(held) - _WARM_UP_LIVES
    grown = after.heap_kb - before.heap_kb
    assert grown <= _HEAP_KB_PER_LIFE * lives, (
        f"rank {rank}'s heap grew by {grown} KB in {lives} lives: {held}"
    )
    # This test keeps the counters of each life, some 120 objects. A result or handle kept per round is more.
    kept = after.python_objects - before.python_objects
    assert kept < rounds * lives, (
        f"rank {rank} kept {kept} objects of {lives} lives of {rounds} rounds: {held}"
    )


def _check_counters(number: int, stats: list[Stats], rounds: int) -> None:
    where = f"life {number}: {stats}"
    for each in stats:
        assert each.rounds == 2 * rounds, where
        assert each.completions == each.writes > 0, where
        assert each.fences == each.signal_requests == 0, where
    # What one writes, another one counts: nothing is lost, and nothing comes twice.
    assert sum(each.immediates for each in stats) == sum(each.writes for each in stats), where
    # All writes between two nodes run along a rail.
    for rail in range(stats[0].nodes):
        ends = stats[rail :: len(stats) // stats[0].nodes]
        assert sum(each.immediates for each in ends) == sum(each.writes for each in ends), where
