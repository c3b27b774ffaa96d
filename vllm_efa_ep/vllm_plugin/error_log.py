"""One clear line in vLLM's log for each error of ours, beside the traceback that vLLM prints."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.vllm_plugin import logger


def use_vllm_log() -> None:
    """Send what the rest of this package logs to vLLM's log; safe to repeat."""
    ours = logging.getLogger("vllm_efa_ep")
    ours.handlers = logging.getLogger("vllm").handlers
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
