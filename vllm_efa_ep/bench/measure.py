"""Timing: contestants take turns inside the same processes, iteration by iteration, in shuffled order."""

import gc
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_efa_ep.bench.barrier import Barrier
from vllm_efa_ep.bench.contestants.contestant import Contestant, Scratch, Workplace
from vllm_efa_ep.bench.problem import Cell, Problem
from vllm_efa_ep.bootstrap import Bootstrap

# Peak memory of a rank in units of (world x tokens) payload rows: scratch buffers, expert outputs, and this
# package's results, staging and slots, twice (`ours` and `ours_elsewhere`).
ROWS_IN_MEMORY = 14
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True)
class Effort:
    """How often a contestant is timed: as often as fits into ``seconds``, within bounds.

    Attributes:
        warm_up: Rounds before the first that counts.
        fewest: Iterations that are timed at least.
        most: Iterations that are timed at most.
        seconds: Time for a contestant's iterations.

    """

    warm_up: int
    fewest: int
    most: int
    seconds: float

    def iterations(self, round_s: float) -> int:
        """Return the number of iterations for rounds of ``round_s`` seconds."""
        return min(self.most, max(self.fewest, int(self.seconds / round_s)))


@dataclass(frozen=True)
class Timings:
    """What was measured of one contestant.

    Attributes:
        steps: Names of the last axis.
        nanoseconds: ``[rank, iteration, step]``.
        per_round: Counters of a round, mean over ranks and iterations.

    """

    steps: tuple[str, ...]
    nanoseconds: npt.NDArray[np.int64]
    per_round: dict[str, float]

    def rounds_us(self) -> npt.NDArray[np.float64]:
        """Return ``[iteration]``: microseconds from input ready to result complete on the slowest rank."""
        slowest: npt.NDArray[np.float64] = self.nanoseconds.sum(axis=2).max(axis=0) / 1e3
        return slowest

    def operation_us(self, operation: str) -> npt.NDArray[np.float64]:
        """Return ``[rank, iteration]``: microseconds inside ``dispatch`` or ``combine``."""
        chosen = [i for i, step in enumerate(self.steps) if step.split("_")[0] == operation]
        microseconds: npt.NDArray[np.float64] = self.nanoseconds[:, :, chosen].sum(axis=2) / 1e3
        return microseconds

    def step_us(self, step: str) -> npt.NDArray[np.float64]:
        """Return ``[rank, iteration]``: microseconds inside one step."""
        microseconds: npt.NDArray[np.float64] = self.nanoseconds[:, :, self.steps.index(step)] / 1e3
        return microseconds


def memory_shortage(cell: Cell, bootstrap: Bootstrap, ranks_on_host: int, device: str = "cpu") -> str:
    """Collective: return why the cell does not fit into some host's, or GPU's, free memory, or nothing."""
    rows = cell.world * cell.tokens
    needed = ROWS_IN_MEMORY * rows * max(cell.row_bytes, cell.combine_row_bytes)
    if device == "cuda":
        available = torch.cuda.mem_get_info()[0]
    else:
        needed *= ranks_on_host
        available = available_memory()
    shortage = f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
    told = bootstrap.all_gather(shortage.encode() if needed > available else b"")
    return next((each.decode() for each in told if each), "")


def available_memory() -> int:
    """Return the bytes that new processes can use without swapping."""
    entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(entries["MemAvailable"].split()[0]) * 1024


def compete(
    problem: Problem,
    classes: tuple[type[Contestant], ...],
    workplace: Workplace,
    barrier: Barrier,
    effort: Effort,
) -> tuple[dict[str, Timings], dict[str, dict[str, object]]]:
    """Collective: check the contestants, run them in turns; return their timings and environments by name."""
    workplace.scratch = Scratch(problem.device)
    contestants = [kind(problem, workplace) for kind in classes]
    for contestant in contestants:
        workplace.scratch.poison()
        problem.out.fill_(float("nan"))
        run_round(contestant, barrier)
        contestant.check()
    bootstrap = workplace.bootstrap
    wanted = [effort.iterations(warm_up(contestant, barrier, effort.warm_up)) for contestant in contestants]
    counts = np.frombuffer(bootstrap.all_gather(np.array(wanted).tobytes())[0], dtype=np.int64)
    before = [contestant.counters() for contestant in contestants]
    nanoseconds: list[list[list[int]]] = [[] for _ in contestants]
    order = np.random.default_rng(0)  # the same on all ranks
    gc.disable()
    for iteration in range(max(counts)):
        for index in order.permutation(len(contestants)):
            # A slow contestant runs less often, but spread over the whole time.
            if (iteration + 1) * counts[index] // max(counts) > iteration * counts[index] // max(counts):
                nanoseconds[index].append(run_round(contestants[index], barrier))
    gc.enable()
    timings = {}
    for contestant, own, start in zip(contestants, nanoseconds, before, strict=True):
        rounds = len(own)
        grown = [(contestant.counters()[name] - value) / rounds for name, value in start.items()]
        timings[contestant.name] = Timings(
            contestant.steps,
            gathered(bootstrap, np.array(own, dtype=np.int64)),
            dict(zip(start, gathered(bootstrap, np.array(grown)).mean(axis=0).tolist(), strict=True)),
        )
    environments = {contestant.name: contestant.environment() for contestant in contestants}
    for contestant in contestants:
        contestant.close()
    return timings, environments


def gathered(bootstrap: Bootstrap, own: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Collective: stack every rank's array, all of one shape."""
    told = bootstrap.all_gather(own.tobytes())
    return np.stack([np.frombuffer(each, own.dtype).reshape(own.shape) for each in told])


def warm_up(contestant: Contestant, barrier: Barrier, rounds: int) -> float:
    """Return the seconds of the fastest of some rounds."""
    return min(sum(run_round(contestant, barrier)) / 1e9 for _ in range(max(1, rounds)))


def run_round(contestant: Contestant, barrier: Barrier) -> list[int]:
    """Return the nanoseconds of each of this rank's steps; all ranks start together."""
    steps = [getattr(contestant, step) for step in contestant.steps]
    synchronize = contestant.problem.synchronize
    times = [0] * (len(steps) + 1)
    synchronize()
    barrier()
    times[0] = time.perf_counter_ns()
    for index, step in enumerate(steps, start=1):
        step()
        synchronize()
        times[index] = time.perf_counter_ns()
    return [after - before for before, after in pairwise(times)]
