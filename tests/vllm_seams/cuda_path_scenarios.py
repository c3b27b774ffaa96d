"""What the CUDA path must compute, each scenario on all ranks at once, compared with ``reference_moe``."""

from collections.abc import Callable

import reference_moe
import torch
from cuda_path_order import ORDER_SCENARIOS, assert_sent_in_place, recorded_launches
from cuda_path_quantised import QUANTISED_SCENARIOS
from cuda_path_refusals import REFUSAL_SCENARIOS
from reference_moe import Layer, Tokens, assert_close
from routed_tokens import LOCAL_EXPERTS, receives_nothing, some_tokens
from standard_experts import StandardExperts, UnreducedExperts
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm_on_ranks import EXPERTS, RANKS, VllmRank

from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY


def both_formats(vllm_rank: VllmRank) -> None:
    """bf16, with unequal and no tokens, over NVLink's and the network's stand-in."""
    layer = Layer.random(EXPERTS, 1)
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer)
        for seed in range(RANKS):
            tokens = some_tokens(vllm_rank.rank, seed)
            assert_close(kernel(tokens), reference_moe.output(layer, tokens))
        (all_to_all,) = vllm_rank.manager._all_to_alls.values()
        assert (all_to_all.stats().nodes, all_to_all.stats().provider) == (2, "efaemu")
        assert all_to_all.config.device == "cuda"
        vllm_rank.manager.close()


def round_robin(vllm_rank: VllmRank) -> None:
    """Placed one by one where the format allows it; vLLM keeps to blocks where experts count on them."""
    layer = Layer.random(EXPERTS, 2)
    for backend, experts, own in (
        (LOW_LATENCY, NaiveBatchedExperts, range(vllm_rank.rank, EXPERTS, RANKS)),
        (HIGH_THROUGHPUT, StandardExperts, range(LOCAL_EXPERTS * vllm_rank.rank, EXPERTS)[:LOCAL_EXPERTS]),
    ):
        kernel = vllm_rank.build(backend, experts, layer, placement="round_robin")
        assert (kernel.expert_map >= 0).nonzero().flatten().tolist() == list(own)
        tokens = some_tokens(vllm_rank.rank, 0)
        assert_close(kernel(tokens), reference_moe.output(layer, tokens))
        vllm_rank.manager.close()


def all_to_one_rank(vllm_rank: VllmRank) -> None:
    """Ranks without any row, in every way to leave work to combine."""
    layer = Layer.random(EXPERTS, 7)
    for backend, experts in (
        (HIGH_THROUGHPUT, StandardExperts),
        (HIGH_THROUGHPUT, UnreducedExperts),
        (LOW_LATENCY, NaiveBatchedExperts),
    ):
        kernel = vllm_rank.build(backend, experts, layer)
        receives_nothing(kernel, vllm_rank.rank, layer)
        vllm_rank.manager.close()


def results_in_place(vllm_rank: VllmRank) -> None:
    """Experts write where other ranks read, for any number of rows, even that of the layer's output."""
    layer = Layer.random(EXPERTS, 8)
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer)
    # Everybody's tokens go to the next rank's experts: what is written is somebody else's.
    first = LOCAL_EXPERTS * ((vllm_rank.rank + 1) % RANKS)
    for count in (6, 6, 1 + vllm_rank.rank):
        tokens = Tokens.random(count, 3, range(first, first + LOCAL_EXPERTS), vllm_rank.rank)
        tokens.ids[:, :LOCAL_EXPERTS] = torch.arange(first, first + LOCAL_EXPERTS)
        with recorded_launches() as launches:
            result = kernel(tokens)
        assert_sent_in_place(vllm_rank, launches)
        assert_close(result, reference_moe.output(layer, tokens))
    vllm_rank.manager.close()


SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (
    both_formats,
    round_robin,
    all_to_one_rank,
    results_in_place,
    *QUANTISED_SCENARIOS,
    *ORDER_SCENARIOS,
    *REFUSAL_SCENARIOS,
)
