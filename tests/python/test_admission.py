"""A socket at which anybody may knock: members get through, however many others stand at the door."""

import logging
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from vllm_efa_ep.bootstrap.admission import callers

_DEADLINE_S = 60.0
_HELLO = b"hello"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening TCP socket."""
    with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as server:
        yield server


def _call(listener: socket.socket, hello: bytes) -> socket.socket:
    connection = socket.create_connection(listener.getsockname())
    connection.sendall(hello)
    return connection


def test_silent_callers_delay_nobody_and_are_limited(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred came first and say nothing; the oldest of them are dropped, the others when all is done."""
    silent = [_call(listener, b"") for _ in range(100)]
    with _call(listener, _HELLO), closing(callers(listener, len(_HELLO), _DEADLINE_S)) as knocking:
        caller = next(knocking)
        assert caller.hello == _HELLO
        caller.close()
    refused = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(refused) == 101 - 64  # the member counts until it has spoken
    for connection in silent:
        connection.settimeout(_DEADLINE_S)
        assert connection.recv(1) == b""
        connection.close()


def test_a_hello_in_parts_is_waited_for(listener: socket.socket) -> None:
    """While others, who say less and go, are handed over as they are."""
    with _call(listener, b"hel") as slow, closing(callers(listener, len(_HELLO), _DEADLINE_S)) as knocking:
        with _call(listener, b"x"):
            pass
        short = next(knocking)
        assert short.hello == b"x"
        short.turn_away("it said too little")
        slow.sendall(b"lo")
        caller = next(knocking)
        assert caller.hello == _HELLO
        assert caller.name == f"127.0.0.1 port {slow.getsockname()[1]}"
        caller.close()


def test_the_deadline_ends_the_wait(listener: socket.socket) -> None:
    """Also with somebody at the door."""
    with _call(listener, b"hel"), pytest.raises(TimeoutError, match="nobody else came"):
        next(callers(listener, len(_HELLO), 0.1))
