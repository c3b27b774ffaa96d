"""One rank of a run; ``launch`` starts this module where no other launcher has started the ranks."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist

from vllm_efa_ep.bench.barrier import make_barrier
from vllm_efa_ep.bench.contestants.contestant import Workplace
from vllm_efa_ep.bench.measure import compete, memory_shortage
from vllm_efa_ep.bench.plan import Plan
from vllm_efa_ep.bench.problem import Problem
from vllm_efa_ep.bench.process_groups import process_groups
from vllm_efa_ep.bench.results import CellResult, entry
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.world import join_world

Report = Callable[[CellResult], None]


def main() -> None:
    """Measure the plan of the command line; rank 0 prints one JSON object per cell."""
    plan = Plan.from_json(sys.argv[1])
    measure_with_torch(plan, lambda result: print(json.dumps(result, default=str), flush=True))


def measure_with_torch(plan: Plan, report: Report) -> None:
    """Join the process group that torchrun's environment variables describe, and measure.

    Args:
        plan: Equal on all ranks.
        report: Called on rank 0 with each cell's result.

    """
    torch.set_num_threads(1)
    plan.check_here()
    mpi = None
    if plan.needs_mpi:
        from mpi4py import MPI

        mpi = MPI.COMM_WORLD
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(mpi.rank), str(mpi.size)
    dist.init_process_group("gloo")
    try:
        group = cast(dist.ProcessGroup, dist.group.WORLD)
        settings = settings_of(plan)
        groups = {"gloo": group}
        if plan.needs_nccl:
            groups["nccl"] = dist.new_group(backend="nccl")
        measure(plan, Workplace(TorchBootstrap(group), settings, groups, mpi), report)
    finally:
        dist.destroy_process_group()


def measure_with(bootstrap: Bootstrap, plan_json: str) -> list[CellResult]:
    """Measure between ranks that ``bootstrap`` connects, without MPI.

    Args:
        bootstrap: Any; what a launcher such as ``run_on_ray`` gives each rank.
        plan_json: ``Plan.to_json()``, equal on all ranks.

    Returns:
        The cells on rank 0, nothing elsewhere.

    """
    torch.set_num_threads(1)
    plan = Plan.from_json(plan_json)
    plan.check_here()
    found: list[CellResult] = []
    with process_groups(bootstrap, plan.backends) as groups:
        measure(plan, Workplace(bootstrap, settings_of(plan), groups), found.append)
    return found


def settings_of(plan: Plan) -> Settings:
    """Return the environment's settings, but for what the plan fixes."""
    return replace(Settings.from_environment(), ranks_per_node=plan.ranks_per_node)


def measure(plan: Plan, workplace: Workplace, report: Report) -> None:
    """Collective: measure every cell of the plan."""
    settings = workplace.settings
    world = join_world(workplace.bootstrap, {"plan": plan.to_json()}, settings.ranks_per_node)
    if plan.device == "cuda":
        torch.cuda.set_device(world.rank_on_host % torch.cuda.device_count())
    name, barrier = make_barrier(workplace.bootstrap, world, settings.timeout_s)
    for cell in plan.cells(world.size, world.ranks_per_node):
        cell.check()
        result: CellResult = {"cell": cell.to_json(), "barrier": name}
        shortage = memory_shortage(cell, workplace.bootstrap, world.ranks_on_host, plan.device)
        if shortage:
            result["left_out"] = shortage
        else:
            problem = Problem(cell, world.rank, plan.seed, plan.device)
            timings, environments = compete(problem, plan.contestants(), workplace, barrier, plan.effort)
            result["wire_floor_bytes"] = mean_floor(problem, workplace.bootstrap)
            result["contestants"] = {
                contestant: entry(cell, each, environments[contestant])
                for contestant, each in timings.items()
            }
        if world.rank == 0:
            report(result)


def mean_floor(problem: Problem, bootstrap: Bootstrap) -> float:
    """Collective: return the fewest payload bytes between nodes per rank and round."""
    told = bootstrap.all_gather(str(problem.wire_floor_bytes()).encode())
    return sum(map(int, told)) / len(told)


if __name__ == "__main__":
    main()
