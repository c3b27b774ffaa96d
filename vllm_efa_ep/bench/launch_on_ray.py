"""Runs the ranks of a plan on the nodes of a Ray cluster."""

from vllm_efa_ep.bench.member import measure_with
from vllm_efa_ep.bench.plan import Plan
from vllm_efa_ep.bench.results import CellResult
from vllm_efa_ep.bootstrap.ray_hosts import run_on_ray


def run_ray(plan: Plan, world: int) -> list[CellResult]:
    """Run the plan as ``world`` ranks on the cluster that this process is connected to.

    Raises:
        EfaEpError: A rank failed; the message names it.

    """
    gpus = int(plan.device == "cuda")
    return run_on_ray(world, measure_with, (plan.to_json(),), gpus_per_rank=gpus)[0]
