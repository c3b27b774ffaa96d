"""Hosts with different numbers of ranks: nodes of their greatest common divisor, and rounds as ever."""

import os
import threading
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Batch, check_combined, check_dispatched, compute_experts
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep import world as world_module

_CONFIG = AllToAllConfig(32, 9, 3, 6, channels=2)
_EXAMPLES = 200 if os.environ.get("LONG_TESTS") == "1" else 15


@st.composite
def _hosts(draw: st.DrawFn) -> list[int]:
    """Draw numbers of ranks per host whose common divisor is often not one."""
    step = draw(st.sampled_from([1, 2, 3]))
    return [step * blocks for blocks in draw(st.lists(st.integers(1, 6 // step), min_size=1, max_size=3))]


@settings(max_examples=_EXAMPLES)
@given(hosts=_hosts(), seed=st.integers(0, 2**32 - 1))
def test_rounds_on_unequal_hosts_match_the_oracle(hosts: list[int], seed: int) -> None:
    """No node reaches over two hosts, none is smaller than need be, and every token gets its experts."""
    host_of = [host for host, ranks in enumerate(hosts) for _ in range(ranks)]
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in host_of:
        tokens = int(torch.randint(0, _CONFIG.max_tokens_per_rank + 1, (), generator=random))
        shape = (tokens, _CONFIG.top_k)
        batches.append(
            Batch(
                torch.randn(tokens, _CONFIG.hidden_size, generator=random).bfloat16(),
                torch.randint(-1, _CONFIG.num_experts, shape, generator=random),
                torch.randn(shape, generator=random),
                None,
            )
        )

    def body(all_to_all: AllToAll) -> None:
        assert all_to_all.world.ranks_per_node == gcd(*hosts)
        assert {host_of[rank] for rank in all_to_all.world.node_ranks} == {host_of[all_to_all.rank]}
        own = batches[all_to_all.rank]
        for channel in (0, 1, 0):
            got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights, channel=channel)
            check_dispatched(_CONFIG, batches, all_to_all.local_experts, got)
            output = compute_experts(_CONFIG, all_to_all.local_experts, got, per_slot=False, weighted=True)
            check_combined(_CONFIG, own, True, False, all_to_all.combine(output, handle))

    with pytest.MonkeyPatch.context() as patch:
        names = {f"rank {rank}": f"host {host}" for rank, host in enumerate(host_of)}
        patch.setattr(world_module, "host_identity", lambda: names[threading.current_thread().name])
        run_world(_CONFIG, len(host_of), settings_of(), body)
