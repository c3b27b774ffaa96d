"""One clear line in vLLM's log for each error of ours, beside the traceback that vLLM prints."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import configure_logging

from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.vllm_plugin import logger


def use_vllm_log() -> None:
    """Send what the rest of this package logs to vLLM's log; safe to repeat."""
    vllm_log, ours = logging.getLogger("vllm"), logging.getLogger("vllm_efa_ep")
    config = get_current_vllm_config_or_none()
    if not vllm_log.handlers and config is not None:
        # The workers of vLLM 0.32's first Ray executor are without a log otherwise.
        configure_logging(config.logging_config)
    ours.handlers = vllm_log.handlers
    ours.propagate = False


@contextmanager
def one_line_per_error() -> Iterator[None]:
    """Log an ``EfaEpError`` of the enclosed calls in one line and let it pass on to vLLM.

    When vLLM ends this process because another one died, its signal interrupts the wait for that rank: the
    line then says who was missing.
    """
    try:
        yield
    except EfaEpError as error:
        logger.error("EFA EP: %s", " ".join(str(error).split()))
        raise
    except (SystemExit, KeyboardInterrupt) as interrupt:
        for note in getattr(interrupt, "__notes__", ()):
            logger.error("EFA EP: %s, and was told to end", note)
        raise
