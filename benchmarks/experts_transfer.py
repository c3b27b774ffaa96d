"""``make bench``: bandwidth of expert weights between two processes of this machine.

One rank pulls experts of DeepSeek-V3 (fp8 weights with block scales, 44 MB each) from the other, which does
nothing meanwhile. Every byte that came is compared. The floor is a copy of the same bytes inside one process.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.experts_plan import Move
from vllm_efa_ep.experts_transfer import ExpertTransfer

HIDDEN, INTERMEDIATE, BLOCK = 7168, 2048, 128
LAYER = "layer 0"
# The environment of the rank that pulls and of the one that is read from.
TRANSPORTS = {
    "shared memory": {},
    "loopback TCP": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"},
}


@dataclass(frozen=True)
class Line:
    """One measured pull; seconds are medians, but for the first one, which connects."""

    experts: int
    bytes: int
    first_seconds: float
    seconds: float
    copy_seconds: float


def main() -> None:
    """Measure every transport and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, 16], help="experts per pull")
    parser.add_argument("--repeat", type=int, default=10, help="pulls of each size")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"two processes on one machine without EFA, {os.cpu_count()} cores, load average {load:.1f}")
    print("transport      experts     MB  first ms       ms   GB/s  copy GB/s")
    for transport, environment in TRANSPORTS.items():
        for line in measure(environment, options.experts, options.repeat):
            first, median, copy = (
                each * 1e3 for each in (line.first_seconds, line.seconds, line.copy_seconds)
            )
            print(
                f"{transport:<14} {line.experts:>7} {line.bytes / 1e6:>6.0f} {first:>9.1f} {median:>8.1f} "
                f"{line.bytes / median / 1e6:>6.2f} {line.bytes / copy / 1e6:>10.2f}",
                flush=True,
            )


def measure(environment: dict[str, str], experts: list[int], repeat: int) -> list[Line]:
    """Run two ranks with these variables and return what the first one measured."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (f"file://{directory}/store", environment, experts, repeat, far)
        ranks = [context.Process(target=run, args=(rank, *arguments)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        far.close()
        try:
            lines: list[Line] = near.recv()
        except EOFError:
            raise SystemExit("a rank failed; its error is above") from None
        finally:
            for rank in ranks:
                rank.join(60)
                rank.kill()
    return lines


def run(
    rank: int,
    store: str,
    environment: dict[str, str],
    experts: list[int],
    repeat: int,
    pipe: "multiprocessing.connection.Connection[list[Line], None]",
) -> None:
    """Be one rank."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    weights, staging = tensors(max(experts)), tensors(max(experts))
    for tensor in weights.values():
        tensor.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    with ExpertTransfer(TorchBootstrap(dist.group.WORLD)) as transfer:
        transfer.offer({LAYER: weights})
        if rank == 0:
            pipe.send([pull(transfer, weights, staging, count, repeat) for count in experts])
        dist.barrier()
    dist.destroy_process_group()


def tensors(slots: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one layer."""
    rows, columns = HIDDEN // BLOCK, INTERMEDIATE // BLOCK
    return {
        "w13": torch.zeros(slots, 2 * INTERMEDIATE, HIDDEN, dtype=torch.uint8),
        "w13_scale": torch.zeros(slots, 2 * columns, rows),
        "w2": torch.zeros(slots, HIDDEN, INTERMEDIATE, dtype=torch.uint8),
        "w2_scale": torch.zeros(slots, rows, columns),
    }


def pull(
    transfer: ExpertTransfer,
    weights: dict[str, torch.Tensor],
    staging: dict[str, torch.Tensor],
    count: int,
    repeat: int,
) -> Line:
    """Pull ``count`` experts, whose bytes both ranks know, repeatedly."""
    moves = [Move(expert, 1, expert, count - 1 - expert) for expert in range(count)]
    seconds, copies = [], []
    for _ in range(repeat + 1):
        for tensor in staging.values():
            tensor.view(torch.uint8).zero_()
        pulled = transfer.pull(LAYER, moves, staging)
        seconds.append(pulled.seconds)
        for name, tensor in staging.items():
            if not torch.equal(
                tensor[:count].view(torch.uint8), weights[name][:count].flip(0).view(torch.uint8)
            ):
                raise SystemExit(f"{name} did not arrive as it was sent")
        started = time.monotonic()
        for name, tensor in staging.items():
            tensor[:count].copy_(weights[name][:count])
        copies.append(time.monotonic() - started)
    return Line(
        count, pulled.bytes, seconds[0], statistics.median(seconds[1:]), statistics.median(copies[1:])
    )


if __name__ == "__main__":
    main()
