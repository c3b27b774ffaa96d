"""What vLLM's configuration must know about our backends, patched in every vLLM process.

Nothing here imports model code, loads the extension or touches the network; ``moe_patches`` does the
rest in the workers, once one of our backends is really used.
"""

import functools
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError, EfaEpError
from vllm_efa_ep.vllm_plugin import (
    config_warnings,
    fault_tolerance,
    logger,
    metrics_endpoint,
    ray_patches,
    seams,
)
from vllm_efa_ep.vllm_plugin.backend_names import (
    BACKEND_NAMES,
    HIGH_THROUGHPUT,
    LOW_LATENCY,
    backend_name,
    is_selected,
)

_STAND_INS = {HIGH_THROUGHPUT: "deepep_high_throughput", LOW_LATENCY: "deepep_low_latency"}
"""The backends of vLLM with the same needs: which of them allow dual-batch overlap, which of them
cannot be captured in CUDA graphs."""


def apply() -> None:
    """Patch the configuration classes and the device communicator; call once per process."""
    # Read by itself, so that it is known although another setting may be malformed.
    chosen = backend_name(os.environ.get("EFA_EP_BACKEND", ""))
    failure = _malformed_setting()
    communicator = _communicator_seam()
    found_problems = seams.problems([*seams.CONFIG_SEAMS, communicator])
    if found_problems:
        failure = failure or seams.seam_error(found_problems)
        # Whoever did not ask for us need not hear about it.
        asked_for = chosen or any(name in argument for argument in sys.argv for name in BACKEND_NAMES)
        logger.log(logging.ERROR if asked_for else logging.DEBUG, "%s", failure)
    else:
        _accept_backend_names(default="" if failure else chosen)
        _extend_properties()
        _stand_in_for_known_backends()
        _wrap_communicator(communicator)
        fault_tolerance.watch_for_workers()
        ray_patches.copy_settings()
    if chosen or failure:
        _wrap_engine_args(chosen, failure)


def _malformed_setting() -> EfaEpError | None:
    try:
        Settings.from_environment()
    except ConfigurationError as error:
        return error
    return None


def _communicator_seam() -> seams.Seam:
    from vllm.platforms import current_platform

    return seams.CPU_COMMUNICATOR_SEAM if current_platform.is_cpu() else seams.CUDA_COMMUNICATOR_SEAM


def _accept_backend_names(default: str) -> None:
    """Widen the ``Literal`` of ``ParallelConfig.all2all_backend`` and set its default if there is one.

    The annotation lives in the module, the class, the dataclass field, the pydantic field and the
    compiled validator; the command line derives its choices and default from them and caches them.
    """
    import vllm.config.parallel as parallel
    import vllm.engine.arg_utils as arg_utils
    from pydantic.dataclasses import rebuild_dataclass

    config_class = parallel.ParallelConfig
    field = config_class.__dataclass_fields__["all2all_backend"]
    pydantic_field = config_class.__pydantic_fields__["all2all_backend"]
    # vLLM with a registry of prepare/finalize factories accepts every string.
    if typing.get_origin(parallel.All2AllBackend) is typing.Literal:
        widened = typing.Literal[(*typing.get_args(parallel.All2AllBackend), *BACKEND_NAMES)]  # type: ignore[valid-type]
        parallel.All2AllBackend = arg_utils.All2AllBackend = widened
        config_class.__annotations__["all2all_backend"] = widened
        field.type = pydantic_field.annotation = widened
    if default:
        config_class.all2all_backend = field.default = pydantic_field.default = default
    rebuild_dataclass(config_class, force=True)
    arg_utils._compute_kwargs.cache_clear()


def _extend_properties() -> None:
    """Give our names the properties vLLM keys on the names it knows."""
    from vllm.config.parallel import ParallelConfig

    def with_expert_parallelism(config: Any) -> bool:
        return bool(config.enable_expert_parallel and config.data_parallel_size > 1)

    # Tokens are split over the TP ranks before the experts, so that TP ranks do not send duplicates.
    extend_property(
        ParallelConfig,
        "use_sequence_parallel_moe",
        lambda config: (
            is_selected(config) and with_expert_parallelism(config) and config.tensor_parallel_size > 1
        ),
    )
    # Lowers the default of max_num_batched_tokens, which sizes the batched buffers.
    extend_property(
        ParallelConfig,
        "use_batched_dp_moe",
        lambda config: config.all2all_backend == LOW_LATENCY and with_expert_parallelism(config),
    )


def extend_property(owner: type, name: str, also: Callable[[Any], bool]) -> None:
    """Make the boolean property ``name`` of ``owner`` also true where ``also`` says so."""
    original = owner.__dict__[name].fget
    setattr(owner, name, property(lambda self: also(self) or original(self)))


def _stand_in_for_known_backends() -> None:
    """Let ``VllmConfig`` validate our backends like the DeepEP backends of the same kind.

    Its checks compare the name with literals inside one long method, hence the temporary name.
    """
    from vllm.config.vllm import VllmConfig

    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.parallel_config.all2all_backend
        if name in _STAND_INS:
            metrics_endpoint.expose()
        self.parallel_config.all2all_backend = _STAND_INS.get(name, name)
        try:
            original(self, *args, **kwargs)
        finally:
            if self.parallel_config.all2all_backend == _STAND_INS.get(name):
                self.parallel_config.all2all_backend = name
        if fault_tolerance.is_wanted(self.parallel_config):
            fault_tolerance.allow_our_backends()  # processes that are forked have it from here
        if is_selected(self.parallel_config):
            ray_patches.prepare(self)
            config_warnings.warn_about(self)

    VllmConfig.__post_init__ = post_init


def _wrap_engine_args(chosen: str, failure: EfaEpError | None) -> None:
    """Apply ``EFA_EP_BACKEND`` where no flag was given, and report a failure if we are selected.

    vLLM loads plugins before it builds the command line, but only after it has built the first
    ``EngineArgs`` of a Python program: that instance still has vLLM's own default.
    """
    from vllm.config.parallel import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    own_default = inspect.signature(EngineArgs).parameters["all2all_backend"].default
    for engine_args in (EngineArgs, *EngineArgs.__subclasses__()):
        _default_to(engine_args, ParallelConfig)
    original_create = EngineArgs.create_engine_config

    @functools.wraps(original_create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        built_before_us = not hasattr(self, "_efa_ep_saw_default")
        if chosen and built_before_us and self.all2all_backend == own_default:
            self.all2all_backend = chosen
        if failure and (chosen or self.all2all_backend in BACKEND_NAMES):
            raise failure
        if chosen and self.all2all_backend != chosen:
            logger.warning(
                "EFA_EP_BACKEND selects %s, but --all2all-backend %s was given and wins",
                chosen,
                self.all2all_backend,
            )
        return original_create(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


def _default_to(engine_args: Any, parallel_config: Any) -> None:
    """Take the default of ``all2all_backend`` from ``ParallelConfig``, and mark the instances."""
    original_init = engine_args.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("all2all_backend", parallel_config.all2all_backend)
        original_init(self, *args, **kwargs)
        self._efa_ep_saw_default = True

    engine_args.__init__ = init


def _wrap_communicator(seam: seams.Seam) -> None:
    """Let the platform's communicator create our manager for the EP group.

    ``__init__`` is wrapped instead of subclassing, because vLLM asserts the exact class elsewhere.
    """
    class_name = seam.attribute.split(".")[0]
    communicator_class: Any = getattr(sys.modules[seam.module], class_name)
    original_init, original_destroy = communicator_class.__init__, communicator_class.destroy
    signature = inspect.signature(original_init)

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        parallel_config = _current_parallel_config()
        ours = (
            call.arguments.get("use_all2all", False)
            and call.arguments.get("unique_name", "").split(":")[0] == "ep"
            and parallel_config is not None
            and is_selected(parallel_config)
        )
        if ours:
            # The original raises (CUDA) or falls back (CPU) on names it does not know.
            call.arguments["use_all2all"] = False
        original_init(*call.args, **call.kwargs)
        if ours:
            from vllm_efa_ep.vllm_plugin import moe_patches

            moe_patches.apply()
            self.use_all2all = True
            self.all2all_manager = moe_patches.make_manager(
                parallel_config, self.cpu_group, call.arguments.get("tcp_store_group")
            )

    @functools.wraps(original_destroy)
    def destroy(self: Any) -> None:
        manager = self.all2all_manager
        original_destroy(self)
        if hasattr(manager, "close"):
            manager.close()

    communicator_class.__init__, communicator_class.destroy = init, destroy


def _current_parallel_config() -> Any:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return None if config is None else config.parallel_config
