"""Tokens of a rank, in unequal numbers and for experts of all ranks or of few."""

from collections.abc import Callable
from typing import Any

import reference_moe
import torch
from reference_moe import Layer, Tokens, assert_close
from vllm_on_ranks import EXPERTS, RANKS

# Ranks take turns, so that each has no tokens once, and once as many as there can be.
TOKEN_COUNTS = (5, 0, 8, 3)
LOCAL_EXPERTS = EXPERTS // RANKS


def some_tokens(rank: int, seed: int, top_k: int = 3) -> Tokens:
    """Return a rank's tokens, for experts anywhere."""
    return Tokens.random(TOKEN_COUNTS[(rank + seed) % RANKS], top_k, range(EXPERTS), RANKS * seed + rank)


def receives_nothing(
    kernel: Any, rank: int, layer: Layer, seen: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
) -> None:
    """Let all tokens go to the first rank: vLLM skips the experts of the others."""
    tokens = Tokens.random(4, 3, range(LOCAL_EXPERTS), rank)
    assert_close(kernel(tokens), reference_moe.output(layer, tokens, seen))
