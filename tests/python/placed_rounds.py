"""Rounds whose tensors lie where few do: over ``activations()``, or at odd addresses."""

import pytest
import torch

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError

_HIDDEN, _TOKENS = 64, 8


def config_of(world_size: int, device: str) -> AllToAllConfig:
    """Return a small configuration with one expert per rank."""
    return AllToAllConfig(_HIDDEN, world_size, 1, _TOKENS, device=device)


def play_over_activations(all_to_all: AllToAll) -> None:
    """Dispatch rows of ``activations()``, to which dispatch itself writes what lies elsewhere."""
    size = all_to_all.world_size
    tokens = _TOKENS - 1
    for shift in range(2 * size):
        ids = (torch.arange(tokens, dtype=torch.int32).flip(0) + shift).remainder(size).unsqueeze(1)
        values = torch.arange(1, tokens + 1).unsqueeze(1).expand(tokens, _HIDDEN).bfloat16()
        for first, step in ((0, 1), (1, 1), (0, 2)):
            x = all_to_all.activations()[first::step]
            x = x[:tokens].copy_(values[: len(x)])
            got, handle = all_to_all.dispatch(x, ids[: len(x)], torch.ones(len(x), 1))
            out = all_to_all.combine(got.x, handle)
            assert torch.equal(out, values[: len(x)]), (shift, first, step)


def play_at_odd_addresses(all_to_all: AllToAll) -> None:
    """Take a token out of a fused row, results out of a buffer, and refuse such a place for the output."""
    ids = torch.tensor([[(all_to_all.rank + 1) % all_to_all.world_size]], dtype=torch.int32)
    x = torch.arange(4 + _HIDDEN).bfloat16().unsqueeze(0)[:, 4:]
    assert x.is_contiguous()
    assert x.data_ptr() % 16 == 8
    got, handle = all_to_all.dispatch(x, ids, torch.ones(1, 1))
    results = torch.empty(1 + got.x.numel(), dtype=torch.bfloat16)[1:].view_as(got.x).copy_(got.x)
    all_to_all.combine_send(results, handle)
    out = torch.empty(1, 4 + _HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match=r"out starts 8 bytes behind a multiple of 16.*torch\.empty"):
        all_to_all.combine_recv(handle, out[:, 4:])
    assert torch.equal(all_to_all.combine_recv(handle, out[:, :_HIDDEN]), x)
