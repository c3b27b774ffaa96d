"""One clear line in vLLM's log for each error of ours, beside the traceback that vLLM prints."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.vllm_plugin import logger


@contextmanager
def one_line_per_error() -> Iterator[None]:
    """Log an ``EfaEpError`` of the enclosed calls in one line and let it pass on to vLLM."""
    try:
        yield
    except EfaEpError as error:
        logger.error("EFA EP: %s", " ".join(str(error).split()))
        raise
