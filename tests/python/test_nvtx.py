"""``EFA_EP_NVTX``: what Nsight Systems gets to see of the halves."""

from dataclasses import replace

import pytest
import torch
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError

_CONFIG = AllToAllConfig(64, 4, 2, 8, device="cpu")
_HALVES = ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"]


class _Library:
    """NVTX as torch calls it; writes down what is opened and closed."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def rangePushA(self, name: str) -> int:  # noqa: N802 - torch's name
        """Open a range."""
        self.calls.append(name)
        return 0

    def rangePop(self) -> int:  # noqa: N802 - torch's name
        """Close the last one."""
        self.calls.append("end")
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    """NVTX, on a machine that has CUDA."""
    library = _Library()
    monkeypatch.setattr(torch.cuda.nvtx, "_nvtx", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return library


def _round(all_to_all: AllToAll) -> None:
    ids = torch.tensor([[0, 1], [2, 3]])
    got, handle = all_to_all.dispatch(torch.ones(2, 64, dtype=torch.bfloat16), ids, torch.ones(2, 2))
    all_to_all.combine(got.x.clone(), handle)


def test_the_halves_are_ranges(library: _Library) -> None:
    """Each is opened and closed before the next, in every round."""

    def body(all_to_all: AllToAll) -> None:
        _round(all_to_all)
        _round(all_to_all)

    run_world(_CONFIG, 1, replace(settings_of(1), nvtx="on"), body)
    assert library.calls == [word for half in _HALVES for word in (half, "end")] * 2


def test_a_half_that_fails_is_closed(library: _Library) -> None:
    """Otherwise all later ranges would lie inside it."""

    def body(all_to_all: AllToAll) -> None:
        with pytest.raises(ConfigurationError):
            all_to_all.dispatch(
                torch.ones(1, 64, dtype=torch.bfloat16), torch.tensor([[9, 9]]), torch.ones(1, 2)
            )

    run_world(_CONFIG, 1, replace(settings_of(1), nvtx="on"), body)
    assert library.calls == ["dispatch_send", "end"]


def test_nothing_is_called_without_the_setting(library: _Library) -> None:
    """It is off by default."""
    run_world(_CONFIG, 1, settings_of(1), _round)
    assert library.calls == []


def test_without_cuda_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty timeline would be no answer; the error says what works there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="EFA_EP_TRACE"):
        run_world(_CONFIG, 1, replace(settings_of(1), nvtx="on"), _round)
