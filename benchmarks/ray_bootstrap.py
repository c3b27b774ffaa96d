"""How long agents take to exchange addresses through the Ray coordinator.

``python -m benchmarks.ray_bootstrap`` starts Ray on this machine. Agents are threads of a few processes, each
with its own membership of the run, so that hundreds of them fit: the coordinator does all that it does for as
many processes, which here share the CPU with it. What is left out is the start of processes.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from vllm_efa_ep.bootstrap.ray import RayBootstrap
from vllm_efa_ep.bootstrap.run import Run

_TARGET = 256
_GATHERS = 5
# Address and key of 32 NICs, as one rank of a p5 instance has at most.
_PAYLOAD_BYTES = 2048


@ray.remote(num_cpus=0)
class _Agents:
    """Some of the agents of a run."""

    def exchange(self, run: Run, first: int, count: int, size: int) -> list[list[float]]:
        """Return the seconds of the join and of each exchange, for each agent."""

        def one(rank: int) -> list[float]:
            begun = time.perf_counter()
            bootstrap = RayBootstrap(run, rank, size)
            bootstrap.compare_hosts()
            seconds = [time.perf_counter() - begun]
            for _ in range(_GATHERS):
                begun = time.perf_counter()
                assert len(bootstrap.all_gather(os.urandom(_PAYLOAD_BYTES))) == size
                seconds.append(time.perf_counter() - begun)
            bootstrap.close()
            return seconds

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(first, first + count)))


def measure(size: int, processes: list[Any]) -> tuple[float, float]:
    """Return the seconds of the slowest agent: of the join, and the median over the exchanges."""
    run = Run.new()
    share, rest = divmod(size, len(processes))
    answers, first = [], 0
    for number, process in enumerate(processes):
        count = share + (number < rest)
        if count:
            answers.append(process.exchange.remote(run, first, count, size))
        first += count
    agents = [seconds for part in ray.get(answers, timeout=600) for seconds in part]
    slowest = [max(step) for step in zip(*agents, strict=True)]
    return slowest[0], statistics.median(slowest[1:])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, nargs="+", default=[16, 32, 64, 128, _TARGET])
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    processes = [_Agents.remote() for _ in range(arguments.processes)]
    measure(arguments.processes, processes)  # imports and connections
    print(f"one coordinator, agents in {arguments.processes} processes, {os.cpu_count()} CPUs for everything")
    print(f"agents  join and compare (s)  exchange of {_PAYLOAD_BYTES} bytes each (s)")
    measured = {}
    for size in arguments.agents:
        join, exchange = measured[size] = measure(size, processes)
        print(f"{size:6}  {join:20.3f}  {exchange:27.3f}", flush=True)
    if _TARGET not in measured:
        largest = max(measured)
        # What the coordinator sends grows with the square of the number of agents.
        factor = (_TARGET / largest) ** 2
        join, exchange = (factor * each for each in measured[largest])
        print(f"{_TARGET:6}  {join:20.3f}  {exchange:27.3f}  EXTRAPOLATED, quadratically from {largest}")


if __name__ == "__main__":
    main()
