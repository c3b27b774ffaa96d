"""Tokens that dispatch quantises, and that it counts itself, on the CPU (on fibers: cuda_on_fibers.py)."""

from dataclasses import replace

import pytest
import torch
from quantised_rounds import config_of, play
from thread_world import ThreadBootstrap, outcomes_of_ranks, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError


@pytest.mark.parametrize("quantisation", ["fp8", "fp8_power_of_2", "fp8_ue8m0"])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_received_rows_are_what_torch_makes_of_the_tokens(quantisation: str, ranks_per_node: int) -> None:
    """Codes, scales and counts, over the network and inside the node."""

    def body(bootstrap: ThreadBootstrap) -> None:
        with AllToAll(config_of(quantisation, "cpu"), bootstrap, settings_of(ranks_per_node)) as all_to_all:
            play(all_to_all, 8)
            with pytest.raises(ConfigurationError, match="no memory takes tokens as they are sent"):
                all_to_all.activations()

    for outcome in outcomes_of_ranks(2, body):
        outcome.get()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": torch.bfloat16}, "makes float8_e4m3fn, but dtype is torch.bfloat16"),
        ({"hidden_size": 96}, "whole groups of 128 elements, but they have 96"),
        ({"scale_columns": 3}, "scale_columns is 3"),
        ({"quantisation": "int4"}, "quantisation is 'int4'; use one of none, fp8, fp8_power_of_2, fp8_ue8m0"),
    ],
)
def test_what_cannot_be_quantised_is_refused(changes: dict[str, object], text: str) -> None:
    """Each with its remedy."""
    with pytest.raises(ConfigurationError, match=text):
        replace(config_of("fp8", "cpu"), **changes).memory_plan(2, 1)


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_beyond_the_rows_is_refused(count: int) -> None:
    """Nothing was sent, so the next call goes through."""
    config = AllToAllConfig(16, 2, 1, 8, torch.float32, torch.float32, device="cpu")

    def body(bootstrap: ThreadBootstrap) -> None:
        x, ids = torch.ones(4, 16), torch.zeros(4, 1, dtype=torch.int32)
        with AllToAll(config, bootstrap, settings_of(1)) as all_to_all:
            wrong = torch.tensor([count], dtype=torch.int32)
            with pytest.raises(ConfigurationError, match=f"count of tokens is {count}, but x has 4 rows"):
                all_to_all.dispatch_send(x, ids, torch.ones(4, 1), count=wrong)
            with pytest.raises(ConfigurationError, match=r"count has dtype torch\.int64"):
                all_to_all.dispatch_send(x, ids, torch.ones(4, 1), count=torch.tensor([4]))
            right = torch.tensor([3], dtype=torch.int32)
            got, handle = all_to_all.dispatch(x, ids, torch.ones(4, 1), count=right)
            assert len(got.x) == 3
            all_to_all.combine(got.x, handle)

    outcomes_of_ranks(1, body)[0].get()
