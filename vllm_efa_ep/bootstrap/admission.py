"""A listening socket at which anybody may knock: telling members of the run from strangers.

Strangers (a port scanner, a process left over from another run, an attacker) must neither get in nor keep
members waiting: callers are heard side by side, so one that says nothing delays nobody, and of those that say
nothing only a limited number is kept.
"""

import logging
import os
import selectors
import socket
import struct
import time
from collections.abc import Generator
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("=iII")
_MOST_SILENT_CALLERS = 64


@dataclass
class Caller:
    """Somebody who connected.

    Attributes:
        connection: The connection, non-blocking.
        hello: What it said; shorter than agreed if it ended the connection before.
        descriptors: File descriptors it sent along (Unix sockets only).

    """

    connection: socket.socket
    hello: bytes = b""
    descriptors: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Say who it is, for people."""
        if self.connection.family == socket.AF_UNIX:
            process, user, _ = self._credentials()
            return f"process {process} of user {user}"
        try:
            host, port, *_ = self.connection.getpeername()
        except OSError:  # it has gone
            return "an unknown address"
        return f"{host} port {port}"

    @property
    def is_same_user(self) -> bool:
        """Whether the process at the other end of a Unix socket belongs to this process's user."""
        return self._credentials()[1] == os.geteuid()

    def turn_away(self, why: str) -> None:
        """Close the connection and log who was refused."""
        logger.warning("EFA EP: refused %s: %s", self.name, why)
        self.close()

    def close(self) -> None:
        """Close the connection and whatever came along."""
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _credentials(self) -> tuple[int, int, int]:
        packed = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, group = _CREDENTIALS.unpack(packed)
        return process, user, group

    def _listen(self, hello_bytes: int) -> bool:
        """Take in what it says; return whether it may say more."""
        try:
            part, descriptors, _, _ = socket.recv_fds(self.connection, hello_bytes - len(self.hello), 1)
        except BlockingIOError:
            return True
        except OSError:  # reset
            return False
        self.descriptors += descriptors
        self.hello += part
        return bool(part) and len(self.hello) < hello_bytes


def callers(listener: socket.socket, hello_bytes: int, timeout_s: float) -> Generator[Caller, None, None]:
    """Yield whoever has said ``hello_bytes`` bytes or ended its connection; the receiver owns the caller.

    Close the generator when enough members are in: it closes the connections of all that still say nothing.

    Raises:
        TimeoutError: ``timeout_s`` seconds have passed.

    """
    deadline = time.monotonic() + timeout_s
    silent: dict[int, Caller] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        try:
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is listener:
                        if (caller := _accept(listener)) is not None:
                            silent[caller.connection.fileno()] = caller
                            selector.register(caller.connection, selectors.EVENT_READ)
                    elif key.fd in silent and not silent[key.fd]._listen(hello_bytes):
                        selector.unregister(key.fileobj)
                        yield silent.pop(key.fd)
                while len(silent) > _MOST_SILENT_CALLERS:
                    oldest = silent.pop(next(iter(silent)))
                    selector.unregister(oldest.connection)
                    oldest.turn_away("it says nothing")
        finally:
            for caller in silent.values():
                caller.close()
    raise TimeoutError("nobody else came")


def _accept(listener: socket.socket) -> Caller | None:
    try:
        connection, _ = listener.accept()
    except (BlockingIOError, ConnectionError):  # it has gone again
        return None
    connection.setblocking(False)
    return Caller(connection)
