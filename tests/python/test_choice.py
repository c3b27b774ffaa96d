"""Which bootstrap the ranks of a process group get, and that they all get the same."""

import pytest
import torch.distributed as dist
from process_world import Rank, run_processes

from vllm_efa_ep.bootstrap import choice
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError


def _choose(_: Rank, wanted: str) -> str:
    return type(choice.choose_bootstrap(dist.group.WORLD, Settings(bootstrap=wanted))).__name__


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_without_ray_the_group_is_used(wanted: str) -> None:
    """Which is what vLLM's own executors give."""
    assert run_processes(2, _choose, wanted) == ["TorchBootstrap"] * 2


def _choose_with_ray_on_rank_0(rank: Rank, wanted: str) -> str:
    choice._is_ray_worker = lambda: rank.bootstrap.rank == 0  # type: ignore[assignment]
    if wanted == "auto":
        return _choose(rank, wanted)
    with pytest.raises(ConfigurationError) as refused:
        _choose(rank, wanted)
    return str(refused.value)


def test_ray_is_for_all_ranks_or_none() -> None:
    """Rank 1 is no Ray worker: `auto` leaves Ray alone on both, and asking for it is an error on both."""
    assert run_processes(2, _choose_with_ray_on_rank_0, "auto") == ["TorchBootstrap"] * 2
    for message in run_processes(2, _choose_with_ray_on_rank_0, "ray"):
        assert "EFA_EP_BOOTSTRAP=ray, but ranks [1] are no Ray workers" in message


def _choose_something_else(rank: Rank) -> str:
    with pytest.raises(ConfigurationError) as refused:
        _choose(rank, "torch" if rank.bootstrap.rank else "ray")
    return str(refused.value)


def test_ranks_that_ask_for_different_ones_hear_of_it() -> None:
    """All of them, instead of waiting for each other at different places."""
    for message in run_processes(2, _choose_something_else):
        assert "ranks disagree about EFA_EP_BOOTSTRAP: ray, torch in rank order" in message
