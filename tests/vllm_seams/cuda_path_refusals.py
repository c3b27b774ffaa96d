"""What the CUDA path refuses, and the hooks that must do no harm."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vllm.platforms
from reference_moe import Layer, Tokens
from standard_experts import StandardExperts
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm_on_ranks import EXPERTS, MAX_TOKENS, VllmRank

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.vllm_plugin import moe_patches
from vllm_efa_ep.vllm_plugin.backend_names import BACKEND_NAMES, HIGH_THROUGHPUT, LOW_LATENCY


def refused_configurations(vllm_rank: VllmRank) -> None:
    """Before anything is connected, with the flag that is at fault."""
    layer = Layer.random(EXPERTS, 21)
    three = vllm_rank.config(LOW_LATENCY, ubatch_size=3)
    with pytest.raises(ConfigurationError, match=r"--ubatch-size 3 .* --enable-dbo"):
        vllm_rank.build(LOW_LATENCY, NaiveBatchedExperts, layer, config=three)
    with pytest.raises(ConfigurationError, match="multiple of 8"):
        vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer, hidden=100)
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer)
    with (
        set_current_vllm_config(vllm_rank.config(HIGH_THROUGHPUT)),
        pytest.raises(ConfigurationError, match=r"modular.*--moe-backend"),
    ):
        all2all_utils.maybe_make_prepare_finalize(kernel.kernel.moe_config, None, use_monolithic=True)
    parallel_config = SimpleNamespace(all2all_backend=LOW_LATENCY, enable_expert_parallel=True)
    with pytest.raises(ConfigurationError, match="--enable-elastic-ep"):
        moe_patches.make_manager(parallel_config, None, object())
    parallel_config.enable_expert_parallel = False
    with pytest.raises(ConfigurationError, match="--enable-expert-parallel"):
        moe_patches.make_manager(parallel_config, None, None)
    with pytest.MonkeyPatch.context() as patch:
        other = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="rocm")
        patch.setattr(vllm.platforms, "current_platform", other)
        with pytest.raises(ConfigurationError, match="not on rocm"):
            moe_patches.make_manager(parallel_config, None, None)
    vllm_rank.manager.close()


def refused_calls(vllm_rank: VllmRank) -> None:
    """Before anything is sent, so that the layer works with what is right."""
    layer = Layer.random(EXPERTS, 22)
    for backend, experts in ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts)):
        kernel = vllm_rank.build(backend, experts, layer)
        tokens = Tokens.random(2, 3, range(EXPERTS), 0)
        elsewhere = replace(kernel, expert_map=kernel.expert_map.roll(1))
        with pytest.raises(ConfigurationError, match="--expert-placement-strategy linear"):
            elsewhere(tokens)
        with pytest.raises(ConfigurationError, match="top-1 routing, not top-3"):
            kernel(tokens, apply_router_weight_on_input=True)
        with pytest.raises(ConfigurationError, match=f"may dispatch {MAX_TOKENS} tokens, not 9"):
            kernel(Tokens.random(9, 3, range(EXPERTS), 0))
        kernel(tokens)
        vllm_rank.manager.close()


def unknown_reductions(vllm_rank: VllmRank) -> None:
    """Experts that leave work which combine does not know, or that do combine's."""

    class ReducingExperts(NaiveBatchedExperts):  # type: ignore[misc]
        def finalize_weight_and_reduce_impl(self) -> object:
            return TopKWeightAndReduceNoOP()

    class OtherExperts(StandardExperts):
        def finalize_weight_and_reduce_impl(self) -> object:
            return object()

    layer = Layer.random(EXPERTS, 23)
    for backend, experts in ((LOW_LATENCY, ReducingExperts), (HIGH_THROUGHPUT, OtherExperts)):
        kernel = vllm_rank.build(backend, experts, layer)
        with pytest.raises(ConfigurationError, match=f"{backend}.*choose another --moe-backend"):
            kernel(Tokens.random(8, 3, range(EXPERTS), 0))
        vllm_rank.manager.close()


def hooks_of_other_features(vllm_rank: VllmRank) -> None:
    """Fault tolerance finds no fault, elasticity nothing to do; graphs stay on only where they can."""
    kernel = vllm_rank.build(LOW_LATENCY, NaiveBatchedExperts, Layer.random(EXPERTS, 24))
    kernel(Tokens.random(3, 3, range(EXPERTS), vllm_rank.rank))
    manager = vllm_rank.manager
    assert not manager.query_fault().item()
    assert manager.query_active_mask().tolist() == [0] * manager.world_size
    assert manager.query_active_mask().dtype == torch.int32
    assert manager.max_sms_used() == 0
    manager.stage_ep_size()
    manager.commit_ep_size()
    with manager.mask_remote_ranks():
        assert not manager.query_fault().item()
    modes = {name: vllm_rank.config(name).compilation_config.cudagraph_mode for name in BACKEND_NAMES}
    assert modes[LOW_LATENCY].has_full_cudagraphs()
    assert modes[HIGH_THROUGHPUT] == CUDAGraphMode.NONE
    manager.close()


REFUSAL_SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (
    refused_configurations,
    refused_calls,
    hooks_of_other_features,
    unknown_reductions,
)
