"""torch's current GPU and stream, asked for in one place, which tests without a GPU replace."""

import torch

from vllm_efa_ep.errors import ConfigurationError


def current_device() -> torch.device:
    """Return the GPU that this thread uses."""
    return torch.device("cuda", torch.cuda.current_device())


def current_ordinal() -> int:
    """Return CUDA's number of that GPU."""
    return torch.cuda.current_device()


def require_current(ordinal: int) -> None:
    """Check that this thread uses the GPU that an ``AllToAll`` was built on: kernels run where torch says.

    Raises:
        ConfigurationError: It uses another one.

    """
    current = torch.cuda.current_device()
    if current != ordinal:
        raise ConfigurationError(
            f"this AllToAll is on GPU {ordinal}, but the calling thread's current GPU is {current}; call it "
            f"inside `with torch.cuda.device({ordinal}):`"
        )


def current_stream() -> int:
    """Return the ``cudaStream_t`` that this thread launches into."""
    return torch.cuda.current_stream().cuda_stream


def is_capturing() -> bool:
    """Whether a CUDA graph records this thread's launches, so that nothing may wait for them."""
    return torch.cuda.is_current_stream_capturing()
