"""Connections by which a coordinator knows who lives: members in, strangers out, and no end unnoticed."""

import asyncio
import logging
import multiprocessing
import os
import queue
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from threading import Thread

import pytest

from vllm_efa_ep.bootstrap.presence import MEMBER_BYTES, Door, Presence
from vllm_efa_ep.bootstrap.run import is_member, new_token
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, MembershipError

_DEADLINE_S = 60.0
_HOST = "127.0.0.1"
_TOKEN = new_token()
_MEMBER = "0b" * MEMBER_BYTES


class OpenDoor:
    """A door in an event loop of its own.

    Attributes:
        port: Where it is.
        events: What it told, in order.

    """

    def __init__(self) -> None:
        """Open it."""
        self.events: queue.Queue[tuple[str, str]] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._door = Door(
            lambda token: is_member(token, _TOKEN),
            lambda member: self.events.put(("arrived", member)),
            lambda member: self.events.put(("departed", member)),
            host_timeout_s=20,
        )
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._door.open(_HOST), self._loop).result(_DEADLINE_S)

    def hear(self, event: str) -> None:
        """Wait for an event, which must be the next."""
        assert self.events.get(timeout=_DEADLINE_S) == (event, _MEMBER)

    def close(self) -> None:
        """End what still runs in the loop, then the loop."""

        async def end() -> None:
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(_DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        self._loop.close()


@pytest.fixture
def door() -> Iterator[OpenDoor]:
    """An open door."""
    opened = OpenDoor()
    yield opened
    opened.close()


def _enter(door: OpenDoor, token: bytes = _TOKEN) -> Presence:
    return Presence(_HOST, door.port, token, _MEMBER, _DEADLINE_S)


def test_a_member_comes_and_goes(door: OpenDoor) -> None:
    """Once inside it says nothing, and may close twice."""
    presence = _enter(door)
    door.hear("arrived")
    presence.ensure()
    presence.close()
    presence.close()
    door.hear("departed")
    presence.ensure()  # closed is closed
    assert presence.closed
    assert door.events.empty()


def _live_with_a_child(port: int, token: bytes, line: Connection) -> None:
    presence = Presence(_HOST, port, token, _MEMBER, _DEADLINE_S)
    child = os.fork()
    if child:
        line.send(child)
        assert not presence.closed
    signal.pause()


def test_the_end_of_a_process_is_noticed(door: OpenDoor) -> None:
    """Though it is killed, and a child that it has forked lives on."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_live_with_a_child, args=(door.port, _TOKEN, far))
    process.start()
    door.hear("arrived")
    child = near.recv()
    try:
        process.kill()
        door.hear("departed")
    finally:
        os.kill(child, signal.SIGKILL)
    process.join(_DEADLINE_S)


def test_strangers_are_refused(door: OpenDoor, caplog: pytest.LogCaptureFixture) -> None:
    """With another token, half of the right one, or nothing; however many they are, a member gets in."""
    with pytest.raises(MembershipError, match="it is not a member"):
        _enter(door, new_token())
    silent = [socket.create_connection((_HOST, door.port)) for _ in range(100)]
    silent[-1].sendall(_TOKEN[:16])
    silent[-1].shutdown(socket.SHUT_WR)
    assert silent[-1].recv(1) == b""
    presence = _enter(door)
    door.hear("arrived")
    assert silent[0].recv(1) == b""  # the oldest had to make room
    assert door.events.empty()
    refused = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(refused) >= 2
    assert all("it is not a member" in message for message in refused)
    presence.close()
    for each in silent:
        each.close()


def test_a_member_connects_again(door: OpenDoor) -> None:
    """When its connection has ended although it lives: the network was away for too long."""
    presence = _enter(door)
    door.hear("arrived")
    presence._connection.shutdown(socket.SHUT_RDWR)
    door.hear("departed")
    presence.ensure()
    door.hear("arrived")
    presence.close()
    door.hear("departed")


def test_a_coordinator_that_is_gone_is_an_error(door: OpenDoor) -> None:
    """At the next request of a member."""
    presence = _enter(door)
    presence._connection.shutdown(socket.SHUT_RDWR)
    with socket.create_server((_HOST, 0)) as server:
        presence._target = server.getsockname()
    with pytest.raises(EfaEpError, match="is gone: "):
        presence.ensure()
    presence.close()


def test_a_door_that_is_not_there() -> None:
    """The remedy is the hosts' firewall."""
    with socket.create_server((_HOST, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigurationError, match="on all ports"):
        Presence(_HOST, port, _TOKEN, _MEMBER, _DEADLINE_S)
