"""Dispatch and combine on GPUs, in the timing boundaries that other libraries publish.

``per_op``: each operation between two CUDA events, its two halves back to back; p50 over all ranks and
iterations (pplx-garden, UCCL-EP). ``interval``: one pair of events from dispatch-input-ready to
combine-complete, the slowest rank of each iteration, median over iterations (AWS's common boundary).

Tokens are bf16, or already quantised to fp8 with one fp32 scale per 128 values; results are bf16. Experts
take no time: what they would have written is there from the start.

    torchrun --nproc-per-node 8 -m benchmarks.gpu_round_trip --tokens 128 --dtype fp8
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from vllm_efa_ep import AllToAll, AllToAllConfig, Dispatched
from vllm_efa_ep.bootstrap.torch import TorchBootstrap

_WARM_UP = 20
_SCALE_BLOCK = 128


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--layout", choices=("per_token", "per_expert"), default="per_expert")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


class Bench:
    """One rank's instance and inputs."""

    def __init__(self, wanted: argparse.Namespace, bootstrap: TorchBootstrap) -> None:
        """Collective: connect, and draw a routing that is uniform over experts."""
        fp8 = wanted.dtype == "fp8"
        self.config = AllToAllConfig(
            *(wanted.hidden, wanted.experts, wanted.top_k, wanted.tokens),
            dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16,
            scale_columns=wanted.hidden // _SCALE_BLOCK if fp8 else 0,
            layout=wanted.layout,
            device="cuda",
        )
        self.all_to_all = AllToAll(self.config, bootstrap)
        random = torch.Generator().manual_seed(wanted.seed * 1000 + bootstrap.rank)
        routing = [
            torch.randperm(wanted.experts, generator=random)[: wanted.top_k] for _ in range(wanted.tokens)
        ]
        self.x = torch.randn(wanted.tokens, wanted.hidden, generator=random).to(self.config.dtype).cuda()
        self.ids = torch.stack(routing).int().cuda()
        self.weights = torch.full((wanted.tokens, wanted.top_k), 1 / wanted.top_k, device="cuda")
        self.scales = torch.ones(wanted.tokens, wanted.hidden // _SCALE_BLOCK, device="cuda") if fp8 else None
        rows = self.all_to_all.expert_capacity
        shape: tuple[int, ...] = (rows, wanted.hidden)
        if wanted.layout == "per_expert":
            shape = (self.all_to_all.num_local_experts, *shape)
        self.outputs = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")

    def results(self, received: Dispatched) -> torch.Tensor:
        """Return what identity experts give, without the time to compute it."""
        return self.outputs if received.topk_ids is None else self.outputs[: len(received.x)]

    def iteration(self, mark: Callable[[], None]) -> None:
        """One round; ``mark`` is called before and after each operation."""
        mark()
        received, handle = self.all_to_all.dispatch(self.x, self.ids, self.weights, self.scales)
        mark()
        output = self.results(received)
        mark()
        self.all_to_all.combine(output, handle)
        mark()


def measure(bench: Bench, iterations: int) -> dict[str, list[float]]:
    """Return microseconds per iteration of dispatch, combine and the whole interval on this rank."""
    times: dict[str, list[float]] = {"dispatch": [], "combine": [], "interval": []}
    for iteration in range(_WARM_UP + iterations):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        marks = iter(events)
        dist.barrier()
        # Hosts leave the barrier far apart. This round ends on all ranks together, and the timed one begins.
        bench.iteration(lambda: None)
        bench.iteration(lambda marks=marks: next(marks).record())
        torch.cuda.synchronize()
        if iteration < _WARM_UP:
            continue
        times["dispatch"].append(1000 * events[0].elapsed_time(events[1]))
        times["combine"].append(1000 * events[2].elapsed_time(events[3]))
        times["interval"].append(1000 * events[0].elapsed_time(events[3]))
    return times


def main() -> None:
    """Measure, and print one JSON object on rank 0."""
    wanted = arguments()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo")
    bench = Bench(wanted, TorchBootstrap(dist.group.WORLD))
    gathered: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, measure(bench, wanted.iterations))
    if dist.get_rank() == 0:
        stats = bench.all_to_all.stats()
        slowest = [max(each) for each in zip(*(times["interval"] for times in gathered), strict=True)]
        print(
            json.dumps(
                {
                    **vars(wanted),
                    "ranks": len(gathered),
                    "gpu": torch.cuda.get_device_name(),
                    "provider": stats.provider,
                    "fabric": stats.fabric,
                    "nics": stats.nics,
                    "num_sms": os.environ.get("EFA_EP_NUM_SMS", "default"),
                    "per_op_p50_us": {
                        name: statistics.median(time for times in gathered for time in times[name])
                        for name in ("dispatch", "combine")
                    },
                    "interval_slowest_rank_median_us": statistics.median(slowest),
                },
                indent=2,
            )
        )
    bench.all_to_all.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
