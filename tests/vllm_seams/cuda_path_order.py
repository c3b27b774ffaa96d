"""When halves run: around shared experts, between two micro-batches, and while a CUDA graph is captured."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fake_gpu
import pytest
import reference_moe
import torch
from cutedsl_experts import experts_of_nvfp4_dispatch, nvfp4_kernel, seen_by_experts
from reference_moe import Layer, Tokens, assert_close
from standard_experts import StandardExperts
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import NaiveBatchedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.v1.worker.gpu_ubatch_wrapper import UBatchWrapper
from vllm.v1.worker.ubatching import make_ubatch_contexts
from vllm_on_ranks import EXPERTS, MAX_TOKENS, RANKS, Kernel, VllmRank

from vllm_efa_ep import _core
from vllm_efa_ep.cuda import streams
from vllm_efa_ep.cuda.halves import CudaHalves
from vllm_efa_ep.errors import RankTimeoutError
from vllm_efa_ep.vllm_plugin.backend_names import HIGH_THROUGHPUT, LOW_LATENCY

HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
MESSAGES: list[str] = []
BACKENDS = ((HIGH_THROUGHPUT, StandardExperts), (LOW_LATENCY, NaiveBatchedExperts))


class KeepMessages(logging.Handler):
    """Keeps what the plugin logs as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        MESSAGES.append(record.getMessage())


logging.getLogger("vllm.efa_ep").addHandler(KeepMessages(logging.ERROR))


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, ...]]]:
    """Yield a list that gets the name of every half that is launched, with its arguments and its stream."""
    launches: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in HALVES:
            original = getattr(CudaHalves, name)

            def launch(self: Any, *given: Any, name: str = name, original: Any = original) -> Any:
                launches.append((name, *given, streams.current_stream()))
                return original(self, *given)

            patch.setattr(CudaHalves, name, launch)
        yield launches


def assert_sent_in_place(vllm_rank: VllmRank, launches: list[tuple[Any, ...]]) -> None:
    """No row was copied by combine_send: experts wrote all of them to the memory that other ranks read."""
    (all_to_all,) = vllm_rank.manager._all_to_alls.values()
    places = [results.data_ptr() for results in all_to_all._generations.current().results]
    sent = [(channel, rows) for name, channel, rows, *_ in launches if name == "combine_send"]
    assert sent
    assert all(rows == places[channel] for channel, rows in sent)


def shared_experts_overlap(vllm_rank: VllmRank) -> None:
    """Shared experts run while results fly: after combine_send, before combine_recv."""
    layer = Layer.random(EXPERTS, 11)
    for backend, experts in BACKENDS:
        kernel = vllm_rank.build(backend, experts, layer)
        tokens = Tokens.random(4, 3, range(EXPERTS), vllm_rank.rank)
        with recorded_launches() as launches:

            class Doubling(torch.nn.Module):
                def forward(self, x: torch.Tensor, launches: list[Any] = launches) -> torch.Tensor:
                    launches.append(("shared",))
                    return 2 * x

            moe_config = kernel.kernel.moe_config
            shared = SharedExperts(
                Doubling(), moe_config, False, lambda kernel=kernel: kernel.kernel.can_overlap_shared_experts
            )
            shared(tokens.x, SharedExpertsOrder.NO_OVERLAP)  # as vLLM's runner asks first
            result = kernel(tokens, shared_experts=shared, shared_experts_input=tokens.x)
        assert [name for name, *_ in launches] == [*HALVES[:3], "shared", HALVES[3]]
        assert torch.equal(shared.output, 2 * tokens.x)
        assert_close(result, reference_moe.output(layer, tokens))
        vllm_rank.manager.close()


def two_micro_batches(vllm_rank: VllmRank) -> None:
    """Dual-batch overlap: vLLM allows it, and its two threads take turns on two channels of one stream."""
    layers = [Layer.random(EXPERTS, 12), Layer.random(EXPERTS, 13)]
    for backend, experts in BACKENDS:
        config = vllm_rank.config(backend, enable_dbo=True)
        kernels = [vllm_rank.build(backend, experts, layer, config=config) for layer in layers]
        batches = [
            [Tokens.random((3 * vllm_rank.rank + 5 * part + layer) % 4, 3, range(EXPERTS), 4 * part + layer)]
            for part in range(2)
            for layer in range(2)
        ]
        tokens = {(part, layer): batches[2 * part + layer][0] for part in range(2) for layer in range(2)}

        def model(
            input_ids: int, kernels: list[Any] = kernels, tokens: dict[Any, Tokens] = tokens, **_: Any
        ) -> torch.Tensor:
            return torch.cat([kernel(tokens[input_ids, layer]) for layer, kernel in enumerate(kernels)])

        wrapper = UBatchWrapper(model, config, CUDAGraphMode.NONE, torch.device("cuda", 0))
        assert wrapper.sm_control.comm_sms == 0
        contexts = make_ubatch_contexts(
            2,
            torch.cuda.current_stream(),
            wrapper.comm_stream,
            [SimpleNamespace(part=0), SimpleNamespace(part=1)],
            wrapper.ready_barrier,
        )
        nothing = {"positions": None, "intermediate_tensors": None, "inputs_embeds": None}
        parts = [SimpleNamespace(context=context, input_ids=context.id, **nothing) for context in contexts]
        with recorded_launches() as launches:
            result = wrapper._run_ubatches(parts, model)
        turns = [(half, channel) for half in ("dispatch", "combine") for channel in range(2)]
        steps = [(f"{half}_{part}", channel) for half, channel in turns for part in ("send", "recv")]
        assert [(name, channel) for name, channel, *_ in launches] == steps * len(layers)
        assert {stream for *_, stream in launches} == {streams.current_stream()}
        expected = [
            reference_moe.output(layers[layer], tokens[part, layer])
            for part in range(2)
            for layer in range(2)
        ]
        assert_close(result, torch.cat(expected))
        (all_to_all_config,) = vllm_rank.manager._all_to_alls
        assert all_to_all_config.channels == 2
        if backend == HIGH_THROUGHPUT:
            assert_sent_in_place(vllm_rank, launches)
        vllm_rank.manager.close()


class ForbidHostReads(TorchDispatchMode):
    """Fails on what a CUDA graph cannot capture: operators that wait for the GPU or ask it for a shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator."""
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} while a graph is captured"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as index"
        return func(*args, **(kwargs or {}))


def not_while_capturing(*_: Any) -> Any:
    """Stand for what waits for the GPU."""
    raise AssertionError("the host waited for the GPU while a graph was captured")


def captured_twice(
    kernel: Kernel, rank: int, layer: Layer, seen: Callable[[torch.Tensor], torch.Tensor]
) -> list[list[tuple[Any, ...]]]:
    """Capture a layer for two batches in the same tensors, and return what was launched."""
    static = Tokens.random(MAX_TOKENS, 3, range(EXPERTS), 0)
    kernel(static)  # vLLM runs every shape once before it captures
    launches_of_round = []
    for seed in range(2):
        tokens = Tokens.random(MAX_TOKENS, 3, range(EXPERTS), 100 * seed + rank)
        tokens.ids[rank:] = -1  # padding, as a graph's batch has
        for place, value in zip(
            (static.x, static.ids, static.weights), (tokens.x, tokens.ids, tokens.weights), strict=True
        ):
            place.copy_(value)
        with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
            for name in ("item", "tolist", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, not_while_capturing)
            patch.setattr(_core.CudaDevice, "wait_for_rows", not_while_capturing)
            patch.setattr("vllm_efa_ep.cuda.driver.Gpu.synchronize", not_while_capturing)
            with fake_gpu.capture(), ForbidHostReads():
                result = kernel(static)
        assert_close(result, reference_moe.output(layer, tokens, seen))
        launches_of_round.append(launches)
    return launches_of_round


def captured_low_latency(vllm_rank: VllmRank) -> None:
    """No half and no step between them waits for the GPU; a replay finds everything where it was captured."""
    layer = Layer.random(EXPERTS, 14)
    kernel = vllm_rank.build(LOW_LATENCY, NaiveBatchedExperts, layer)
    first, second = captured_twice(kernel, vllm_rank.rank, layer, torch.Tensor.float)
    assert first[:2] == second[:2]  # inputs and receive buffers; vLLM owns the rest
    vllm_rank.manager.close()


def captured_nvfp4(vllm_rank: VllmRank) -> None:
    """Nor does what quantises before dispatch, and orders scales after it."""
    with experts_of_nvfp4_dispatch():
        kernel, layer = nvfp4_kernel(vllm_rank, 22)
        first, second = captured_twice(kernel, vllm_rank.rank, layer, seen_by_experts)
    assert first[1] == second[1]
    vllm_rank.manager.close()


def captured_high_throughput(vllm_rank: VllmRank) -> None:
    """If this backend is captured after all, there is room for all rows, and only those that came count."""
    layer = Layer.random(EXPERTS, 15)
    kernel = vllm_rank.build(HIGH_THROUGHPUT, StandardExperts, layer)
    tokens = Tokens.random(vllm_rank.rank, 3, range(EXPERTS), vllm_rank.rank)
    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches, fake_gpu.capture():
        patch.setattr(_core.CudaDevice, "wait_for_rows", not_while_capturing)
        patch.setattr("vllm_efa_ep.cuda.halves.is_capturing", streams.is_capturing)
        result = kernel(tokens)
    assert_close(result, reference_moe.output(layer, tokens))
    assert_sent_in_place(vllm_rank, launches)
    vllm_rank.manager.close()


def fault_in_a_replay(vllm_rank: VllmRank) -> None:
    """A replayed graph makes no call that could raise: vLLM asks after each step, and the log says who."""
    manager = vllm_rank.manager
    manager._settings = replace(manager._settings, timeout_s=3.0)
    assert manager.support_fault_tolerance
    kernel = vllm_rank.build(LOW_LATENCY, NaiveBatchedExperts, Layer.random(EXPERTS, 16))
    static = Tokens.random(MAX_TOKENS, 3, range(EXPERTS), 0)
    with recorded_launches() as launches:
        kernel(static)
    assert not manager.query_fault().item()
    if vllm_rank.rank != RANKS - 1:  # which does not replay
        (all_to_all,) = manager._all_to_alls.values()
        halves = all_to_all._generations.current()._device
        sent, received = (given[1:-1] for given in launches[:2])
        halves.dispatch_send(*sent)
        with pytest.raises(RankTimeoutError):  # by what stands in for the stream's order
            halves.dispatch_recv(*received)
        assert manager.query_fault().item()
        assert manager.query_active_mask().shape == (RANKS,)
        assert any(f"dispatch_recv of round 2 on rank {vllm_rank.rank} waited" in text for text in MESSAGES)
        with pytest.raises(RankTimeoutError, match="dispatch_recv of round 2"):
            kernel(static)
        assert manager.query_fault().item()
    manager.close()


ORDER_SCENARIOS: tuple[Callable[[VllmRank], None], ...] = (
    shared_experts_overlap,
    two_micro_batches,
    captured_low_latency,
    captured_nvfp4,
    captured_high_throughput,
    fault_in_a_replay,
)
