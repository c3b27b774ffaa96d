"""Passing descriptors inside a node, with peers that do not come and strangers that do."""

import os
import socket
import struct
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
            invitations = [each.decode() for each in bootstrap.all_gather(exchange.invitation.encode())]
            received = exchange.exchange(own, invitations, 30.0)
        assert sorted(received) == [rank for rank in range(bootstrap.world_size) if rank != bootstrap.rank]
        for rank, descriptor in received.items():
            assert f"of rank {rank} " in str(Path(f"/proc/self/fd/{descriptor}").readlink())
            os.close(descriptor)
        os.close(own)

    run_ranks(5, body)


def test_a_missing_peer_is_an_error_in_time(exchanges: list[DescriptorExchange]) -> None:
    """Peers that are there and silent, and one that has gone."""
    invitations = [exchange.invitation for exchange in exchanges]
    with pytest.raises(ConfigurationError, match=r"index \[1, 2\] did not share their memory within 0\.2 s"):
        exchanges[0].exchange(0, invitations, 0.2)
    exchanges[2].close()
    with pytest.raises(ConfigurationError, match="did not share"):
        exchanges[1].exchange(0, invitations, 30.0)


def _knock(exchange: DescriptorExchange, hello: bytes, descriptors: list[int]) -> socket.socket:
    name = exchange.invitation.split()[0]
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.connect(f"\0{name}")
    socket.send_fds(stranger, [hello], descriptors)
    return stranger


def test_strangers_are_turned_away_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """Every process sees the socket's name. Knocking there neither gets anything nor harms the run."""

    def body(bootstrap: ThreadBootstrap) -> list[int]:
        with closing(DescriptorExchange(bootstrap.rank, 2)) as exchange, ExitStack() as strangers:
            token = bytes.fromhex(exchange.invitation.split()[1])
            own_rank = struct.pack("=I", bootstrap.rank)
            for hello in (b"x", bytes(32) + struct.pack("=I", 1 - bootstrap.rank), token + own_rank):
                with _knock(exchange, hello, [0]) as stranger:
                    stranger.shutdown(socket.SHUT_WR)
            # Two that only say nothing, to the end of the exchange.
            for _ in range(2):
                silent = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                silent.connect(f"\0{exchange.invitation.split()[0]}")
            invitations = [each.decode() for each in bootstrap.all_gather(exchange.invitation.encode())]
            received = exchange.exchange(0, invitations, 30.0)
        for descriptor in received.values():
            os.close(descriptor)
        return list(received)

    assert run_ranks(2, body) == [[1], [0]]
    refused = [record.message for record in caplog.records]
    assert len(refused) == 6
    for message in refused:
        assert f"refused process {os.getpid()} of user {os.geteuid()}" in message


def test_descriptors_received_before_a_failure_are_closed(exchanges: list[DescriptorExchange]) -> None:
    """One peer has come, the other does not."""
    invitations = [exchange.invitation for exchange in exchanges]
    descriptor = os.memfd_create("of rank 1")
    with pytest.raises(ConfigurationError, match=r"index \[0, 2\]"):
        exchanges[1].exchange(descriptor, invitations, 0.1)
    with pytest.raises(ConfigurationError, match=r"index \[2\]"):
        exchanges[0].exchange(descriptor, invitations, 0.1)
    os.close(descriptor)
