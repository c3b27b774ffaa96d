"""What a configuration that selects one of our backends does not get of it, said before vLLM starts."""

import functools
from collections.abc import Iterator
from typing import Any

from vllm_efa_ep.vllm_plugin import logger
from vllm_efa_ep.vllm_plugin.backend_names import LOW_LATENCY


def warn_about(config: Any) -> None:
    """Log each warning about a complete ``VllmConfig``, once per process."""
    for warning in warnings_about(config):
        _warn_once(warning)


def warnings_about(config: Any) -> Iterator[str]:
    """Yield what is wrong with a ``VllmConfig`` that names one of our backends."""
    if config.model_config is None or not config.model_config.is_moe:
        return
    parallel = config.parallel_config
    name = parallel.all2all_backend
    if not parallel.use_all2all:
        yield (
            f"--all2all-backend {name} is not used: with data parallel size 1 every rank has all tokens, and "
            "vLLM exchanges none; add --data-parallel-size, and --enable-expert-parallel"
        )
        return
    reason = _unasked(config)
    if name == LOW_LATENCY and reason and _replays_graphs(config):
        yield (
            f"vLLM does not ask after each step whether a round of {name} failed {reason}, and replayed CUDA "
            "graphs cannot raise: tokens may be wrong until the next step without a graph; --enforce-eager "
            "avoids that"
        )


def _unasked(config: Any) -> str:
    """Say why vLLM's model runner never calls ``query_fault`` on some rank; empty if it does on all."""
    if config.parallel_config.data_parallel_size == 1:
        return "without data parallelism"
    if config.model_config.runner_type == "pooling":
        return "of a pooling model"
    if config.parallel_config.pipeline_parallel_size > 1:
        return "in any pipeline stage but the last"
    if not (config.scheduler_config.async_scheduling or config.use_v2_model_runner):
        return "with synchronous scheduling in model runner V1"
    return ""


def _replays_graphs(config: Any) -> bool:
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda() and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
