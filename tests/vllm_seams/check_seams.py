"""Check every seam and every patch of the plugin against the vLLM that this process imports.

    PYTHONPATH=<vLLM's sources> python check_seams.py

A process of its own for each check, because patches stay. Prints what does not fit and exits with 1.
"""

import importlib
import inspect
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
import vllm
import vllm.platforms

from vllm_efa_ep.errors import ConfigurationError, EfaEpError
from vllm_efa_ep.vllm_plugin import register, seams
from vllm_efa_ep.vllm_plugin.backend_names import BACKEND_NAMES, HIGH_THROUGHPUT, LOW_LATENCY


def choose_platform() -> None:
    """Make vLLM believe it runs on CPUs; without its extension it would find no platform at all."""
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms.current_platform = CpuPlatform()


def check_seams() -> None:
    """All fit, and the doctor looks at all that a platform uses."""
    values = [each if isinstance(each, tuple) else (each,) for each in vars(seams).values()]
    listed = {seam for each in values for seam in each if isinstance(seam, seams.Seam)}
    seams.require(listed)
    of_cpu = set(seams.platform_seams())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
        assert of_cpu | set(seams.platform_seams()) == listed


def check_configuration() -> None:
    """The names are accepted and have the properties of backends of their kind."""
    from vllm.config.parallel import ParallelConfig
    from vllm.engine.arg_utils import get_kwargs

    choices = get_kwargs(ParallelConfig)["all2all_backend"]["choices"]
    for name in BACKEND_NAMES:
        assert name in choices
        config = ParallelConfig(
            all2all_backend=name,
            enable_expert_parallel=True,
            tensor_parallel_size=2,
            data_parallel_size=2,
        )
        assert config.use_sequence_parallel_moe
        assert config.use_batched_dp_moe == (name == LOW_LATENCY)
        assert pickle.loads(pickle.dumps(config)).all2all_backend == name
    with pytest.raises(pydantic.ValidationError):
        ParallelConfig(all2all_backend="no_such_backend")
    assert ParallelConfig().all2all_backend == "allgather_reducescatter"


def check_settings_on_ray() -> None:
    """What all hosts share reaches engines on Ray; what a host has for itself is left alone."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    shared = {"EFA_EP_BACKEND", "EFA_EP_PROVIDER", "EFA_EP_STATS_DIR", "FI_EFA_FORK_SAFE"}
    of_one_host = {"EFA_EP_TOKEN_FILE", "EFA_EP_LIBFABRIC", "EFA_EP_INTERFACE"}
    with pytest.MonkeyPatch.context() as patch:
        for name in shared | of_one_host:
            patch.setenv(name, "x")
        copied = get_env_vars_to_copy()
    assert shared <= copied
    assert not of_one_host & copied


def parallel(name: str) -> Any:
    """Return the parallel configuration of an MoE layer on four EP ranks."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    sizes = {"tp_size": 1, "pcp_size": 1, "dp_size": 4, "ep_size": 4, "sp_size": 1}
    ranks = {"tp_rank": 0, "pcp_rank": 0, "dp_rank": 1, "ep_rank": 1}
    return FusedMoEParallelConfig(**sizes, **ranks, use_ep=True, all2all_backend=name, enable_eplb=False)


def check_layers() -> None:
    """A layer with one of our names gets our prepare/finalize object; others get what they got before."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import all2all_utils
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    from vllm_efa_ep.vllm_plugin.high_throughput import HighThroughputPrepareFinalize
    from vllm_efa_ep.vllm_plugin.low_latency import LowLatencyPrepareFinalize

    assert unquantized.maybe_make_prepare_finalize is all2all_utils.maybe_make_prepare_finalize
    manager = SimpleNamespace(world_size=4, rank=1)
    expected = {HIGH_THROUGHPUT: HighThroughputPrepareFinalize, LOW_LATENCY: LowLatencyPrepareFinalize}
    with set_current_vllm_config(VllmConfig()):
        for name, implementation in expected.items():
            config = parallel(name)
            moe = SimpleNamespace(moe_parallel_config=config, num_experts=8, max_num_tokens=16)
            made = all2all_utils.maybe_make_prepare_finalize(moe, None, all2all_manager=manager)
            assert type(made) is implementation
            assert made.num_dispatchers() == 4
            assert made.allocate_fused_expert_output((1, 8), None, None, TopKWeightAndReduceNoOP()) is None
            assert config.use_batched_activation_format == (name == LOW_LATENCY)
            assert config.needs_round_robin_routing_tables
            with pytest.raises(ConfigurationError, match="modular"):
                all2all_utils.maybe_make_prepare_finalize(
                    moe, None, all2all_manager=manager, use_monolithic=True
                )
    other = parallel("allgather_reducescatter")
    assert not other.use_batched_activation_format
    assert not other.needs_round_robin_routing_tables


def check_warnings() -> None:
    """A configuration that does not use us, or not as safely as others, is told so, once."""
    from vllm.config import CUDAGraphMode, ParallelConfig, VllmConfig

    from vllm_efa_ep.vllm_plugin import config_warnings

    def warnings(
        backend: str = LOW_LATENCY,
        moe: bool = True,
        runner: str = "generate",
        asynchronous: bool = True,
        v2: bool = False,
        graphs: CUDAGraphMode = CUDAGraphMode.FULL,
        cuda: bool = True,
        **parallel: Any,
    ) -> str:
        sizes = {"data_parallel_size": 2, "enable_expert_parallel": True, **parallel}
        config = SimpleNamespace(
            model_config=SimpleNamespace(is_moe=moe, runner_type=runner),
            parallel_config=ParallelConfig(all2all_backend=backend, **sizes),
            scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
            compilation_config=SimpleNamespace(cudagraph_mode=graphs),
            use_v2_model_runner=v2,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm.platforms.current_platform, "is_cuda", lambda: cuda)
            return "\n".join(config_warnings.warnings_about(config))

    one = {"data_parallel_size": 1, "tensor_parallel_size": 8}
    assert not warnings(moe=False, **one)
    for name in BACKEND_NAMES:
        assert f"{name} is not used" in warnings(name, **one)
    unasked: dict[str, dict[str, Any]] = {
        "without data parallelism": {"data_parallel_size": 1, "prefill_context_parallel_size": 2},
        "of a pooling model": {"runner": "pooling"},
        "any pipeline stage but the last": {"pipeline_parallel_size": 2},
        "synchronous scheduling": {"asynchronous": False},
    }
    assert not warnings()
    assert not warnings(asynchronous=False, v2=True)
    for words, options in unasked.items():
        assert words in warnings(**options)
        assert not warnings(HIGH_THROUGHPUT, **options)
        assert not warnings(graphs=CUDAGraphMode.NONE, **options)
        assert not warnings(cuda=False, **options)

    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_warnings, "warnings_about", lambda _: ["not used"])
        patch.setattr(config_warnings.logger, "warning", lambda _, text: told.append(text))
        for backend in ("allgather_reducescatter", LOW_LATENCY, LOW_LATENCY):
            VllmConfig(parallel_config=ParallelConfig(all2all_backend=backend))
    assert told == ["not used"]


def differing_signatures(implementation: type) -> Iterator[str]:
    """Yield the public methods that vLLM could not call as it calls those they override."""
    for name, method in inspect.getmembers(implementation, inspect.isfunction):
        if not method.__module__.startswith("vllm_efa_ep.") or name == "__init__":
            continue
        for base in implementation.__mro__:
            overridden = base.__dict__.get(name)
            if not base.__module__.startswith("vllm.") or not inspect.isfunction(overridden):
                continue
            wanted = [each for each in inspect.signature(overridden).parameters if each != "self"]
            try:
                inspect.signature(method).bind(None, *wanted)
                inspect.signature(method).bind(None, **dict.fromkeys(wanted))
            except TypeError as error:
                yield f"{implementation.__name__}.{name}: {error}; vLLM passes {wanted}"
            break


def check_communicators() -> None:
    """Both communicators create our manager for the EP group, and only there."""
    from vllm_efa_ep.vllm_plugin import config_patches, moe_patches

    config = SimpleNamespace(all2all_backend=LOW_LATENCY, enable_expert_parallel=True)
    made = SimpleNamespace(closed=False)
    made.close = lambda: setattr(made, "closed", True)
    moe_patches.make_manager = lambda *_: made
    config_patches._current_parallel_config = lambda: config
    for seam in (seams.CPU_COMMUNICATOR_SEAM, seams.CUDA_COMMUNICATOR_SEAM):
        module = importlib.import_module(seam.module)
        communicator_class = getattr(module, seam.attribute.split(".")[0])
        original_signature = inspect.signature(communicator_class.__init__)

        def init(
            self: Any, *args: Any, signature: inspect.Signature = original_signature, **kwargs: Any
        ) -> None:
            call = signature.bind(self, *args, **kwargs)
            self.asked_for = call.arguments.get("use_all2all", False)
            self.cpu_group = call.arguments["cpu_group"]
            self.all2all_manager = None

        init.__signature__ = original_signature  # type: ignore[attr-defined]
        communicator_class.__init__ = init
        communicator_class.destroy = lambda _self: None
        config_patches._wrap_communicator(seam)

        experts = communicator_class("group", unique_name="ep:0", use_all2all=True)
        assert not experts.asked_for
        assert experts.all2all_manager is made
        experts.destroy()
        assert made.closed
        assert communicator_class("group", unique_name="tp:0").all2all_manager is None
        config.all2all_backend = "allgather_reducescatter"
        assert communicator_class("group", unique_name="ep:0", use_all2all=True).asked_for
        config.all2all_backend = LOW_LATENCY


def check_fault_tolerance() -> None:
    """Our backends may survive faults; vLLM sees a loss after a step, and has it masked by its command."""
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase
    from vllm.v1.worker.sentinel import gpu_worker_sentinel
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_efa_ep.vllm_plugin import fault_tolerance, manager

    parallel_config = SimpleNamespace(
        all2all_backend=LOW_LATENCY,
        enable_fault_tolerance=True,
        data_parallel_rank=0,
        data_parallel_size=2,
        data_parallel_master_ip="",
        world_size=1,
        cpu_distributed_timeout=None,
    )
    WorkerBase.__init__ = lambda self: setattr(self, "parallel_config", parallel_config)
    fault_tolerance.watch_for_workers()

    class Worker(WorkerBase):
        rank = 0

    with pytest.raises(ValueError, match="FT-capable"):
        gpu_worker_sentinel.WorkerSentinel(SimpleNamespace(parallel_config=parallel_config))
    sentinel = gpu_worker_sentinel.WorkerSentinel(Worker())
    assert {"deepep_low_latency", *BACKEND_NAMES} <= gpu_worker_sentinel.FT_BACKEND_SET

    def init(self: Any, _group: Any) -> None:
        self.rank, self.world_size = 0, 3

    All2AllManagerBase.__init__ = init
    ours = manager.EfaEpAll2AllManager("group", fault_tolerance.is_wanted(parallel_config))
    assert ours.support_fault_tolerance
    layer = SimpleNamespace(
        lost=(),
        failed=False,
        masks=0,
        lost_ranks=lambda: layer.lost,
        fault=lambda: torch.tensor(layer.failed),
        raise_fault=lambda: None,
    )

    def mask() -> None:
        layer.failed = False
        layer.masks += 1

    layer.mask = mask
    ours._all_to_alls["configuration"] = layer
    assert not ours.query_fault().item()
    layer.failed = True
    assert ours.query_fault().item()
    layer.lost, layer.failed = (1,), False
    assert ours.query_fault().item()
    assert ours.query_active_mask().tolist() == [0, 1, 0]
    assert ours.query_active_mask().dtype == torch.int32

    gpu_worker_sentinel.torch.accelerator.synchronize = lambda: None
    gpu_worker_sentinel.get_ep_all2all_manager = lambda: ours
    gpu_worker_sentinel.get_dp_group = lambda: SimpleNamespace(cpu_group=None)
    gpu_worker_sentinel.stateless_destroy_torch_distributed_process_group = lambda _group: None
    gpu_worker_sentinel.stateless_init_torch_distributed_process_group = lambda *_, **__: None
    sentinel._clean_worker_state = lambda: None
    sentinel.retry(SimpleNamespace(params={"new_stateless_dp_group_ports": [1]}))
    assert layer.masks == 1
    assert not ours.query_fault().item()


def check_close() -> None:
    """Neither a full disk nor an instance that fails leaves connections open."""
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

    from vllm_efa_ep.vllm_plugin import manager

    closed: list[str] = []

    def closes(name: str, error: Exception) -> Any:
        def close() -> None:
            closed.append(name)
            raise error

        return SimpleNamespace(close=close)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(All2AllManagerBase, "__init__", lambda self, _: vars(self).update(rank=0, world_size=1))
        patch.setattr(manager, "SnapshotWriter", lambda *_: closes("snapshots", OSError("disk full")))
        ours = manager.EfaEpAll2AllManager("group")
        for name in ("first", "second"):
            ours._all_to_alls[name] = closes(name, EfaEpError(name))
        with pytest.raises(EfaEpError):
            ours.close()
    assert closed == ["snapshots", "first", "second"]
    assert not ours._all_to_alls


def check_eplb_order() -> None:
    """On a GPU, nothing is fetched into the buffer before the streams are done that copy out of it."""
    from vllm_efa_ep.vllm_plugin import eplb

    class GpuTensor(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    events: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(synchronize=lambda: events.append(name))

    transfer = SimpleNamespace(
        backend="UCX",
        offer=lambda _: None,
        pull_together=lambda *_: events.append("fetch"),
        close=lambda: None,
    )
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eplb, "TorchBootstrap", lambda _: None)
        patch.setattr(eplb, "ExpertTransfer", lambda _: transfer)
        patch.setattr(torch.cuda, "current_stream", lambda: stream("vLLM's own"))
        for tensor_type, awaited in ((GpuTensor, ["vLLM's own"]), (torch.Tensor, [])):
            buffer = torch.zeros(2, 4).as_subclass(tensor_type)
            communicator = eplb.EfaEpEplbCommunicator(group, [[buffer]], [buffer])
            for worker_stream, of_worker in ((None, []), (stream("worker's"), awaited and ["worker's"])):
                communicator.set_stream(worker_stream)
                communicator.set_transfer_context(np.arange(2), layer_idx=0)
                communicator.execute()
                assert events == [*awaited, *of_worker, "fetch"]
                events.clear()


def check_classes() -> None:
    """Our subclasses of vLLM's classes are complete and take the arguments that vLLM passes."""
    from vllm_efa_ep.vllm_plugin.cpu_batched_experts import CpuBatchedExperts
    from vllm_efa_ep.vllm_plugin.eplb import EfaEpEplbCommunicator
    from vllm_efa_ep.vllm_plugin.high_throughput import HighThroughputPrepareFinalize
    from vllm_efa_ep.vllm_plugin.low_latency import LowLatencyPrepareFinalize
    from vllm_efa_ep.vllm_plugin.manager import EfaEpAll2AllManager

    for implementation in (
        HighThroughputPrepareFinalize,
        LowLatencyPrepareFinalize,
        EfaEpAll2AllManager,
        CpuBatchedExperts,
        EfaEpEplbCommunicator,
    ):
        missing = getattr(implementation, "__abstractmethods__", ())
        assert not missing, f"{implementation.__name__} lacks {sorted(missing)}"
        differing = list(differing_signatures(implementation))
        assert not differing, "\n".join(differing)


def main() -> None:
    """Run all checks."""
    choose_platform()
    check_seams()

    register()
    check_configuration()
    check_settings_on_ray()
    check_warnings()

    from vllm_efa_ep.vllm_plugin import moe_patches

    moe_patches.apply()
    check_layers()
    check_classes()
    check_close()
    check_eplb_order()
    check_communicators()
    check_fault_tolerance()
    print(f"all seams fit vLLM {vllm.__version__}")


if __name__ == "__main__":
    main()
