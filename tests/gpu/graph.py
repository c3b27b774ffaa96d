"""A round captured into a CUDA graph and replayed with other tokens; torchrun as for rounds.py.

At the end one rank stays away from a replay, and the others must learn of it in the stream's order.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import RankTimeoutError

_TOKENS, _HIDDEN, _TOP_K, _REPLAYS = 16, 256, 4, 20


def main() -> None:
    """Experts are the identity and weights add up to 1, so every token must come back as it went."""
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    experts = 4 * dist.get_world_size()
    config = AllToAllConfig(
        _HIDDEN, experts, _TOP_K, _TOKENS, torch.float32, torch.float32, layout="per_expert", device="cuda"
    )
    settings = replace(Settings.from_environment(), timeout_s=5.0)
    with AllToAll(config, TorchBootstrap(dist.group.WORLD), settings) as all_to_all:
        x = torch.zeros(_TOKENS, _HIDDEN, device="cuda")
        ids = torch.zeros(_TOKENS, _TOP_K, dtype=torch.int32, device="cuda")
        weights = torch.full((_TOKENS, _TOP_K), 1 / _TOP_K, device="cuda")
        out = torch.empty_like(x)

        def run_round() -> None:
            received, handle = all_to_all.dispatch(x, ids, weights)
            all_to_all.combine(received.x, handle, out, weights_applied=False)

        run_round()  # what happens once, such as loading kernels, must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_round()
        random = torch.Generator().manual_seed(dist.get_rank())
        for replay in range(_REPLAYS):
            tokens = torch.randn(_TOKENS, _HIDDEN, generator=random)
            routing = torch.stack(
                [torch.randperm(experts, generator=random)[:_TOP_K] for _ in range(_TOKENS)]
            )
            x.copy_(tokens)
            ids.copy_(routing)
            graph.replay()
            torch.testing.assert_close(out.cpu(), tokens, msg=f"replay {replay}")
        assert not all_to_all.fault()
        if dist.get_rank() < dist.get_world_size() - 1:
            graph.replay()
            assert all_to_all.fault()  # without a synchronisation before it
            with pytest.raises(RankTimeoutError, match="dispatch_recv"):
                all_to_all.raise_fault()
    if dist.get_rank() == 0:
        print(f"passed: {_REPLAYS} replays", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
