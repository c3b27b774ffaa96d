"""Noticing at once that the process of a rank has ended, however it ended.

Ranks hold TCP connections on which nothing is said while all is well. The kernel closes a process's
connections when it ends, so the end of a connection is the end of a process, or of a host, which TCP's
keep-alive finds out. It is the one signal that needs no cooperation of the dead and no traffic of the living.

The connections form a tree: each rank to the first rank of its host, and the first ranks to one of them. With
128 hosts of 8 ranks that one holds 134 connections, the first rank of any other host 8, and everybody else 1.
A rank that sees an end tells its other neighbours, who tell theirs: three steps at most. Every end is passed
on, for the survivors to know whom they need not wait for, but waits name the first, from which others may
follow. Whoever goes because of it, or in order, says so before (``leave``).

A frozen process keeps its connections; for it there is the deadline of the halves. The first rank whose
deadline passes may call the others off (``call_off``), whose waits then end, too.

A half on the CPU asks while it waits (``check``); a kernel cannot, so its rank is told (``end_waits_by``).
"""

import json
import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from threading import Thread
from typing import Any
from weakref import WeakMethod, WeakSet

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.admission import callers
from vllm_efa_ep.bootstrap.keep_alive import expect_signs_of_life
from vllm_efa_ep.bootstrap.run import TOKEN_BYTES, is_member, new_token
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError, RankLostError
from vllm_efa_ep.messages import integer, read_json
from vllm_efa_ep.world import World, agree

CheckWait = Callable[[str, int, str], None]
"""Raises to end a wait; takes the half, the round, and the wait in words."""

logger = logging.getLogger(__name__)

# A rank that is gone, or the sender's own rank: it leaves, or that everybody is called off.
_NEWS = struct.Struct("!I")
_CALLED_OFF = 2**32 - 1
_HELLO = struct.Struct(f"!{TOKEN_BYTES}sI")


class Watch:
    """One rank's connections to its neighbours, and a thread that listens to them."""

    def __init__(self, rank: int, size: int, neighbours: dict[int, socket.socket]) -> None:
        """Take over connections to other ranks' watches, by rank, in a world of ``size``."""
        self._rank = rank
        self._size = size
        self._neighbours = neighbours
        self._leaving: set[int] = set()
        self._lost: int | None = None
        self._gone: frozenset[int] = frozenset()
        self._called_off = False
        self._left = False
        self._ends_waits: WeakMethod[Callable[[], None]] | None = None
        self._wake, self._woken = socket.socketpair()
        self._thread = Thread(target=self._listen, name="efa_ep_watch", daemon=True)
        _watches.add(self)
        self._thread.start()

    @property
    def lost(self) -> int | None:
        """The first rank whose end was noticed, if any."""
        return self._lost

    @property
    def called_off(self) -> bool:
        """Whether another rank has ended everybody's waits."""
        return self._called_off

    @property
    def gone(self) -> frozenset[int]:
        """All ranks whose end was noticed."""
        return self._gone

    def check(self, half: str, round: int, wait: str) -> None:
        """End a wait that will not be answered.

        Args:
            half: What waits.
            round: In which round.
            wait: The same in words, and for whom it waits.

        Raises:
            RankLostError: A rank is gone, or others call for a mask.

        """
        loss = self.loss(half, round, wait)
        if loss is not None:
            raise loss

    def loss(self, half: str, round: int, wait: str) -> RankLostError | None:
        """Return what ``check`` raises, None if the wait may be answered."""
        if self._lost is not None:
            return RankLostError(f"{wait}, but {self.verdict()}", half, round, self._lost)
        if self._called_off:
            return RankLostError(f"{wait}, but another rank has given up and called mask()", half, round, -1)
        return None

    def end_waits_by(self, end_waits: Callable[[], None]) -> None:
        """Have ``end_waits`` called, once or more, when a rank is gone or others call for a mask.

        Args:
            end_waits: A method, whose object this does not keep alive. It is called here if that is known
                already, else by the watch's thread, and not after ``close``.

        """
        self._ends_waits = WeakMethod(end_waits)
        if self._lost is not None or self._called_off:
            end_waits()

    def verdict(self) -> str:
        """Say who is gone, empty if nobody is."""
        return "" if self._lost is None else f"rank {self._lost} is gone: its process has ended or failed"

    def leave(self) -> None:
        """Tell the neighbours that the end of this rank, which may come now, is no news."""
        if not self._left:
            self._left = True
            self._tell(self._rank, self._neighbours)

    def call_off(self) -> None:
        """End the waits of all ranks; those of this one must be over."""
        self._tell(_CALLED_OFF, self._neighbours)
        self.leave()

    def close(self) -> None:
        """End the connections; safe to repeat."""
        if self._thread.is_alive():
            self._wake.send(b"\0")
            self._thread.join()
        self.forget()

    def forget(self) -> None:
        """Close the connections in this process only."""
        _watches.discard(self)
        for connection in (*self._neighbours.values(), self._wake, self._woken):
            connection.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for rank, connection in self._neighbours.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)

    def _hear(self, neighbour: int) -> bool:
        """Take in what a neighbour says; return whether it may say more."""
        try:
            news = _receive(self._neighbours[neighbour], _NEWS.size)
        except OSError:  # reset, or its host does not answer
            news = b""
        if len(news) < _NEWS.size:
            if neighbour not in self._leaving:
                self._lose(neighbour, neighbour)
            return False
        (rank,) = _NEWS.unpack(news)
        if rank == _CALLED_OFF:
            if not self._called_off:
                self._called_off = True
                self._tell(rank, self._others(neighbour))
                self._end_waits()
        elif rank == neighbour:
            self._leaving.add(rank)
        elif rank >= self._size:
            logger.error(
                "EFA EP: rank %d says that rank %d is gone, in a world of %d: it counts as failed; run "
                "the same version of vllm-efa-ep on every rank",
                *(neighbour, rank, self._size),
            )
            self._lose(neighbour, neighbour)
            return False
        else:
            self._lose(rank, neighbour)
        return True

    def _lose(self, rank: int, source: int) -> None:
        if rank in self._gone:
            return
        # Passed on first: what this rank does because of it must not be heard before it.
        self._tell(rank, self._others(source))
        self._gone |= {rank}
        if self._lost is None:
            self._lost = rank
            logger.error("EFA EP: rank %d sees that %s", self._rank, self.verdict())
            self._end_waits()

    def _end_waits(self) -> None:
        end_waits = self._ends_waits() if self._ends_waits is not None else None
        if end_waits is not None:
            end_waits()

    def _others(self, source: int) -> list[int]:
        return [neighbour for neighbour in self._neighbours if neighbour != source]

    def _tell(self, rank: int, neighbours: "dict[int, socket.socket] | list[int]") -> None:
        for neighbour in neighbours:
            with suppress(OSError):  # it has ended, too
                self._neighbours[neighbour].sendall(_NEWS.pack(rank))


_watches: WeakSet[Watch] = WeakSet()


def _forget_all() -> None:
    for watch in list(_watches):
        watch.forget()


# A child that kept its parent's connections would outlive it on its behalf.
os.register_at_fork(after_in_child=_forget_all)


@dataclass(frozen=True)
class _Listener:
    """Where a rank's neighbours find it, and how they prove that they are neighbours."""

    address: str
    port: int
    token: str

    @classmethod
    def of(cls, said: Any) -> "_Listener":
        """Interpret what a rank says about its own."""
        address, port, token = said
        if not isinstance(address, str) or not isinstance(token, str):
            raise TypeError("address and token are strings")
        ip_address(address)
        if len(bytes.fromhex(token)) != TOKEN_BYTES:
            raise ValueError(f"a token has {TOKEN_BYTES} bytes")
        return cls(address, integer(port, 1 << 16), token)


def start_watch(
    world: World, bootstrap: Bootstrap, timeout_s: float, host_timeout_s: int = Settings.host_timeout_s
) -> Watch:
    """Collective: connect this rank to its neighbours. Stand-ins have none: their processes are watched.

    Args:
        world: All ranks.
        bootstrap: Connects the ranks until their watches do.
        timeout_s: How long to wait for a neighbour, in seconds.
        host_timeout_s: After how many seconds without a sign of life a neighbour's host counts as gone.

    Raises:
        ConfigurationError: A neighbour cannot be reached.

    """
    with ExitStack() as cleanup:
        address = "127.0.0.1" if world.single_host else bootstrap.address

        leaders: dict[int, int] = {}  # the first live rank of each host
        for member in world.members:
            leaders.setdefault(world.host_of[member], member)

        def listen() -> tuple[socket.socket | None, bytes]:
            if world.rank not in leaders.values():
                return None, b""
            server = cleanup.enter_context(_listen_at(address))
            return server, json.dumps([address, server.getsockname()[1], new_token().hex()]).encode()

        server, told = agree(bootstrap, "listening for the other ranks", listen)
        listeners = {
            rank: read_json(each, f"rank {rank}", _Listener.of) for rank, each in enumerate(told) if each
        }
        root = _root(listeners)
        leader_of = {member: leaders[world.host_of[member]] for member in world.members}
        parent_of = {rank: root if rank == leader else leader for rank, leader in leader_of.items()}
        children = {rank for rank, parent in parent_of.items() if parent == world.rank != rank}

        def meet() -> tuple[dict[int, socket.socket], bytes]:
            neighbours = {}
            if world.rank in parent_of and world.rank != root:
                parent = parent_of[world.rank]
                neighbours[parent] = _call(listeners[parent], parent, world.rank, timeout_s)
                cleanup.enter_context(neighbours[parent])
            if server is not None:
                for rank, connection in _answer(server, listeners[world.rank], children, timeout_s).items():
                    neighbours[rank] = cleanup.enter_context(connection)
            for connection in neighbours.values():
                connection.settimeout(None)
                expect_signs_of_life(connection, host_timeout_s)
            return neighbours, b""

        neighbours, _ = agree(bootstrap, "connecting the ranks that watch each other", meet)
        cleanup.pop_all()
        if server is not None:
            server.close()
    return Watch(world.rank, world.size, neighbours)


def _root(listeners: dict[int, _Listener]) -> int:
    """Choose the rank that all hosts connect to: not one that knows itself by an address of its host only."""
    return min(listeners, key=lambda rank: (ip_address(listeners[rank].address).is_loopback, rank))


def _listen_at(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise ConfigurationError(f"this host cannot listen at its address {address}: {error}") from error


def _call(listener: _Listener, parent: int, rank: int, timeout_s: float) -> socket.socket:
    try:
        connection = socket.create_connection((listener.address, listener.port), timeout_s)
        connection.sendall(_HELLO.pack(bytes.fromhex(listener.token), rank))
    except OSError as error:
        raise ConfigurationError(
            f"rank {parent} cannot be reached at {listener.address}, port {listener.port}: {error}; ranks "
            "must accept TCP connections of each other's hosts on all ports"
        ) from error
    return connection


def _answer(
    server: socket.socket, listener: _Listener, children: set[int], timeout_s: float
) -> dict[int, socket.socket]:
    """Accept every child; whoever else connects is turned away."""
    accepted: dict[int, socket.socket] = {}
    token = bytes.fromhex(listener.token)
    with ExitStack() as on_error, closing(callers(server, _HELLO.size, timeout_s)) as knocking:
        while missing := children - accepted.keys():
            try:
                caller = next(knocking)
            except OSError as error:
                raise ConfigurationError(
                    f"ranks {sorted(missing)} did not connect within {timeout_s:g} s: {error}"
                ) from error
            offered, rank = _HELLO.unpack(caller.hello) if len(caller.hello) == _HELLO.size else (b"", -1)
            if is_member(offered, token) and rank in missing:
                accepted[rank] = on_error.enter_context(caller.connection)
            else:
                caller.turn_away("it is not one of the ranks that this rank watches")
        on_error.pop_all()
    return accepted


def _receive(connection: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes, or fewer if the connection ends."""
    received = b""
    while len(received) < size and (part := connection.recv(size - len(received))):
        received += part
    return received
