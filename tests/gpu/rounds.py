"""Rounds of the Python tests, on GPUs: one process per rank, started by torchrun (docs/gpu_test.md).

torchrun --nproc-per-node 4 tests/gpu/rounds.py                                 # several ranks on one GPU
torchrun --nproc-per-node 8 tests/gpu/rounds.py                                 # one rank per GPU
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 tests/gpu/rounds.py
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from test_round import Scene, body_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.torch import TorchBootstrap

_MODELS = {  # hidden size, experts, top-k
    "DeepSeek-V3": (7168, 256, 8),
    "Kimi-K2": (7168, 384, 8),
    "Qwen3-235B": (4096, 128, 8),
    "GPT-OSS-120B": (2880, 128, 4),
    "Mixtral": (4096, 8, 2),
}


def scenes(ranks: int, ranks_per_node: int) -> Iterator[tuple[str, Scene]]:
    """Every model's shape in both layouts, then small shapes of every type; all seeded."""
    nodes = ranks // ranks_per_node
    for name, (hidden, experts, top_k) in _MODELS.items():
        for layout in ("per_token", "per_expert"):
            config = AllToAllConfig(hidden, experts, top_k, 32, layout=layout, device="cuda")
            yield f"{name}, {layout}", Scene(nodes, ranks_per_node, config, 2, 1, False, False, True)
    for seed, (dtype, combine_dtype, scales) in enumerate(
        [
            (torch.bfloat16, torch.bfloat16, 0),
            (torch.float16, torch.float32, 0),
            (torch.float32, torch.float16, 0),
            (torch.float8_e4m3fn, torch.bfloat16, 5),
            (torch.uint8, torch.bfloat16, 3),
        ]
    ):
        for per_slot in (False, True):
            config = AllToAllConfig(
                *(240, 3 * ranks, 3, 20, dtype, combine_dtype),
                scale_columns=scales,
                channels=2,
                device="cuda",
            )
            name = f"{dtype} to {combine_dtype}, {'slots' if per_slot else 'in place'}"
            yield (
                name,
                Scene(
                    nodes, ranks_per_node, config, 5, seed, False, per_slot, per_slot, in_place=not per_slot
                ),
            )


def main() -> None:
    """Play all scenes; the first difference to the oracle ends the program."""
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    bootstrap = TorchBootstrap(dist.group.WORLD)
    for name, scene in scenes(dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])):
        with AllToAll(scene.config, bootstrap) as all_to_all:
            body_of(scene, device="cuda")(all_to_all)
            provider = all_to_all.stats().provider or "shared memory"
        if dist.get_rank() == 0:
            print(f"passed: {name} ({provider})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
