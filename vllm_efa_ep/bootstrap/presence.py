"""Members of a run hold a connection to its coordinator, on which nothing is said.

The kernel closes a process's connections when it ends, however it ends, so the coordinator knows at once who
is gone; a host that ends without a word is found out by TCP's keep-alive.
"""

import asyncio
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from weakref import WeakSet

from vllm_efa_ep.bootstrap.keep_alive import expect_signs_of_life
from vllm_efa_ep.bootstrap.run import TOKEN_BYTES
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, MembershipError

logger = logging.getLogger(__name__)

MEMBER_BYTES = 8
"""Of the number by which a process is told apart from others that claim its rank."""

_HELLO = struct.Struct(f"!{TOKEN_BYTES}s{MEMBER_BYTES}s")
_WELCOME = b"+"
_HELLO_SECONDS = 5.0
_MOST_SILENT_CALLERS = 64


class Door:
    """The coordinator's end of the connections, in its event loop."""

    def __init__(
        self,
        is_member: Callable[[bytes], bool],
        arrived: Callable[[str], None],
        departed: Callable[[str], None],
        host_timeout_s: int,
    ) -> None:
        """Tell members from strangers.

        Args:
            is_member: Whether a token is the run's.
            arrived: Is told which member has connected.
            departed: Is told which member's connection has ended.
            host_timeout_s: After how many seconds without a sign of life a member's host counts as gone.

        """
        self._is_member = is_member
        self._arrived = arrived
        self._departed = departed
        self._host_timeout_s = host_timeout_s
        self._silent: dict[asyncio.StreamWriter, None] = {}
        self._listening: asyncio.Future[asyncio.Server] | None = None

    async def open(self, address: str) -> int:
        """Listen at ``address``, of this host, and return the port; the same for all who call it."""
        if self._listening is None:
            listening = asyncio.start_server(self._serve, address, 0, backlog=socket.SOMAXCONN)
            self._listening = asyncio.ensure_future(listening)
        port: int = (await self._listening).sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            member = await self._admit(reader, writer)
            if member is None:
                return
            self._arrived(member)
            try:
                expect_signs_of_life(writer.get_extra_info("socket"), self._host_timeout_s)
                writer.write(_WELCOME)
                await reader.read(1)  # comes back at the connection's end
            except OSError:  # reset, or silent for too long
                pass
            finally:
                self._departed(member)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """Return which member it is, None for strangers. Those that say nothing delay nobody."""
        self._silent[writer] = None
        if len(self._silent) > _MOST_SILENT_CALLERS:
            next(iter(self._silent)).transport.abort()
        try:
            hello = await asyncio.wait_for(reader.readexactly(_HELLO.size), _HELLO_SECONDS)
        except (OSError, EOFError, asyncio.TimeoutError):
            hello = bytes(_HELLO.size)
        finally:
            del self._silent[writer]
        token, member = _HELLO.unpack(hello)
        if not self._is_member(token):
            logger.warning("EFA EP: refused %s: it is not a member", writer.get_extra_info("peername"))
            return None
        return str(member.hex())


class Presence:
    """A member's end of its connection; safe to use from several threads."""

    def __init__(self, address: str, port: int, token: bytes, member: str, timeout_s: float) -> None:
        """Connect to the coordinator.

        Args:
            address: Of its host.
            port: Of its door.
            token: The run's.
            member: ``MEMBER_BYTES`` in hexadecimal, which no other process has.
            timeout_s: How long it may take.

        Raises:
            ConfigurationError: The door cannot be reached.
            MembershipError: The run has another token.

        """
        self._target = address, port
        self._hello = _HELLO.pack(token, bytes.fromhex(member))
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        try:
            self._connection = self._connect()
        except MembershipError:  # which is an OSError, too
            raise
        except OSError as error:
            raise ConfigurationError(
                f"the run's coordinator cannot be reached at {address}, port {port}: {error}; hosts must "
                "accept TCP connections of each other on all ports"
            ) from error
        _presences.add(self)

    def ensure(self) -> None:
        """Connect again if the connection has ended: the network was away, and this process was not.

        Raises:
            EfaEpError: The coordinator is gone.

        """
        with self._lock:
            if not self.closed and self._has_ended():
                try:
                    again = self._connect()
                except MembershipError:
                    raise
                except OSError as error:
                    address, port = self._target
                    raise EfaEpError(
                        f"the run's coordinator at {address}, port {port}, is gone: {error}"
                    ) from error
                self._connection.close()
                self._connection = again

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._connection.fileno() < 0

    def close(self) -> None:
        """End the connection; safe to repeat."""
        self._connection.close()

    def _has_ended(self) -> bool:
        try:
            return self._connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _connect(self) -> socket.socket:
        with ExitStack() as on_error:
            connection = on_error.enter_context(socket.create_connection(self._target, self._timeout_s))
            connection.sendall(self._hello)
            if connection.recv(len(_WELCOME)) != _WELCOME:
                address, port = self._target
                raise MembershipError(
                    f"the run's coordinator at {address}, port {port}, refuses this process: it is not a "
                    "member"
                )
            connection.setblocking(False)
            on_error.pop_all()
        return connection


_presences: WeakSet[Presence] = WeakSet()


def _close_all() -> None:
    for presence in list(_presences):
        presence.close()


# A child that kept its parent's connection would outlive it on its behalf.
os.register_at_fork(after_in_child=_close_all)
