"""Passing descriptors inside a node, with peers that do not come and strangers that do."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from thread_world import ThreadBootstrap, run_ranks

from vllm_efa_ep.bootstrap.descriptors import DescriptorExchange
from vllm_efa_ep.errors import ConfigurationError


def _open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def exchanges() -> Iterator[list[DescriptorExchange]]:
    """Exchanges of a node of three ranks."""
    with ExitStack() as cleanup:
        yield [cleanup.enter_context(closing(DescriptorExchange(index, 3))) for index in range(3)]


@pytest.fixture(autouse=True)
def _no_descriptor_stays_open() -> Iterator[None]:
    before = _open_descriptors()
    yield
    assert _open_descriptors() == before


def test_every_rank_gets_every_other_ranks_descriptor() -> None:
    """By the index of its owner."""

    def body(bootstrap: ThreadBootstrap) -> None:
        own = os.memfd_create(f"of rank {bootstrap.rank}")
        with closing(DescriptorExchange(bootstrap.rank, bootstrap.world_size)) as exchange:
            names = [name.decode() for name in bootstrap.all_gather(exchange.name.encode())]
            received = exchange.exchange(own, names, 30.0)
        assert sorted(received) == [rank for rank in range(bootstrap.world_size) if rank != bootstrap.rank]
        for rank, descriptor in received.items():
            assert f"of rank {rank} " in str(Path(f"/proc/self/fd/{descriptor}").readlink())
            os.close(descriptor)
        os.close(own)

    run_ranks(5, body)


def test_a_missing_peer_is_an_error_in_time(exchanges: list[DescriptorExchange]) -> None:
    """Peers that are there and silent, and one that has gone."""
    names = [exchange.name for exchange in exchanges]
    with pytest.raises(ConfigurationError, match=r"index \[1, 2\] did not share their memory within 0\.2 s"):
        exchanges[0].exchange(0, names, 0.2)
    exchanges[2].close()
    with pytest.raises(ConfigurationError, match="did not share"):
        exchanges[1].exchange(0, names, 30.0)


@pytest.mark.parametrize("message", [b"", b"x", b"\x00" * 4])
def test_a_stranger_is_an_error_in_time(exchanges: list[DescriptorExchange], message: bytes) -> None:
    """Somebody who sends too little, or no descriptor, is not part of the run."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(f"\0{exchanges[0].name}")
        stranger.sendall(message)
        stranger.shutdown(socket.SHUT_WR)
        with pytest.raises(ConfigurationError, match="not part of this run"):
            exchanges[0].exchange(0, [exchange.name for exchange in exchanges], 30.0)


def test_a_stranger_that_says_nothing_is_an_error_in_time(exchanges: list[DescriptorExchange]) -> None:
    """It holds the line until the deadline and no longer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(f"\0{exchanges[0].name}")
        with pytest.raises(ConfigurationError, match=r"did not share their memory within 0\.2 s"):
            exchanges[0].exchange(0, [exchange.name for exchange in exchanges], 0.2)


def test_descriptors_received_before_a_failure_are_closed(exchanges: list[DescriptorExchange]) -> None:
    """One peer comes, the other does not."""
    names = [exchange.name for exchange in exchanges]
    descriptor = os.memfd_create("of rank 1")

    def send() -> None:
        with pytest.raises(ConfigurationError):
            exchanges[1].exchange(descriptor, names, 0.3)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(ConfigurationError, match=r"index \[2\]"):
        exchanges[0].exchange(descriptor, names, 0.3)
    thread.join()
    os.close(descriptor)
