"""A thread whose current GPU is not an ``AllToAll``'s is told so: kernels run where torch says."""

import pytest
import torch

from vllm_efa_ep.cuda import streams
from vllm_efa_ep.cuda.kept_memory import KeptMemory
from vllm_efa_ep.errors import ConfigurationError


def test_a_half_on_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """New threads use GPU 0, whatever the thread that started them uses."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    streams.require_current(0)
    with pytest.raises(
        ConfigurationError, match=r"is on GPU 1, but .* current GPU is 0; .*torch\.cuda\.device\(1\)"
    ):
        streams.require_current(1)


def test_the_next_generation_stays_on_the_gpu_of_the_first() -> None:
    """Captured graphs have addresses of that one."""
    kept = KeptMemory()
    kept.stay_on(1)
    kept.stay_on(1)
    with pytest.raises(ConfigurationError, match=r"on GPU 1, but .* is 0; .*torch\.cuda\.device\(1\)"):
        kept.stay_on(0)
