"""What the CUDA path must do, each scenario on all ranks at once."""

from collections.abc import Callable
from typing import Any

import pytest
import reference_moe
import torch
from reference_moe import HIDDEN, Layer, Tokens, assert_close
from standard_experts import Fp4Experts, SelfQuantizingExperts, StandardExperts, UnreducedExperts, swizzled
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm_on_ranks import EXPERTS, Kernel, VllmRank

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

TOKENS_OF_RANK = (5, 0, 8, 3)
BLOCK_FP8 = {"quant_dtype": torch.float8_e4m3fn, "block_shape": [128, 128]}


def some_tokens(rank: int, seed: int, top_k: int = 3) -> Tokens:
    """Return a rank's tokens for experts anywhere."""
    return Tokens.random(TOKENS_OF_RANK[rank], top_k, range(EXPERTS), 10 * seed + rank)


def both_formats(vllm_rank: VllmRank) -> None:
    """bf16 in both backends, several rounds with unequal and no tokens; vLLM's own batched experts."""
    layer = Layer.random(EXPERTS, 1)
    for backend, experts in ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts)):
        kernel = vllm_rank.build(backend, experts, layer)
        for seed in range(3):
            tokens = some_tokens((vllm_rank.rank + seed) % len(TOKENS_OF_RANK), seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens))
        vllm_rank.manager.close()


SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (both_formats,)
