"""Gatherings over keys: what a world has when its process group is gone."""

import pytest
from thread_world import Rendezvous, ThreadBootstrap, outcomes_of_ranks, run_ranks

from vllm_efa_ep.bootstrap.generation import GenerationBootstrap
from vllm_efa_ep.errors import EfaEpError, RankTimeoutError

_LONG_S = 1000.0
_SOON_S = 1.0


def test_every_rank_gets_every_payload_in_order() -> None:
    """Any bytes, any number of times, and apart from another generation's on the same keys."""
    rendezvous = Rendezvous(3)

    def body(thread: ThreadBootstrap) -> list[list[bytes]]:
        first, second = (
            GenerationBootstrap(ThreadBootstrap(rendezvous, thread.rank), generation, thread.rank, _LONG_S)
            for generation in (1, 2)
        )
        own = bytes([thread.rank, 0, 255])
        return [first.all_gather(own), second.all_gather(b""), first.all_gather(own * 2)]

    payloads = [bytes([rank, 0, 255]) for rank in range(3)]
    expected = [payloads, [b""] * 3, [payload * 2 for payload in payloads]]
    assert run_ranks(3, body) == [expected] * 3


@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_rank_is_named(absent: int) -> None:
    """By those who miss it, and by those who only hear of it."""
    rendezvous = Rendezvous(3)

    def body(thread: ThreadBootstrap) -> None:
        if thread.rank != absent:
            bootstrap = ThreadBootstrap(rendezvous, thread.rank)
            GenerationBootstrap(bootstrap, 1, thread.rank, _SOON_S).all_gather(b"")

    for rank, outcome in enumerate(outcomes_of_ranks(3, body)):
        if rank != absent:
            assert isinstance(outcome.error, RankTimeoutError)
            assert f"waited for rank {absent}" in str(outcome.error)


def test_nobody_waits_for_a_rank_that_gave_up() -> None:
    """They say why it did."""
    rendezvous = Rendezvous(3)

    def body(thread: ThreadBootstrap) -> None:
        bootstrap = GenerationBootstrap(ThreadBootstrap(rendezvous, thread.rank), 1, thread.rank, _LONG_S)
        if thread.rank == 2:
            bootstrap.give_up("no memory left")
            raise EfaEpError("no memory left")
        bootstrap.all_gather(b"")

    for outcome in outcomes_of_ranks(3, body)[:2]:
        assert "it was given up by rank 2: no memory left" in str(outcome.error)
