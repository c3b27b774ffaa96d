"""Passing file descriptors between the ranks of one node, so that they can map each other's memory."""

import os
import secrets
import socket
import struct
from contextlib import ExitStack

from vllm_efa_ep.errors import ConfigurationError

_INDEX = struct.Struct("=I")
_CREDENTIALS = struct.Struct("=iII")


class DescriptorExchange:
    """One rank's end: an abstract Unix socket, which leaves nothing behind in any file system.

    Build it, let the peers know ``name`` by other means, then call ``exchange`` and ``close``.
    """

    def __init__(self, index: int, size: int) -> None:
        """Listen for the other ``size - 1`` ranks of the node; ``index`` is this rank's place among them."""
        self._index = index
        self._size = size
        self.name = f"vllm-efa-ep-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(size)

    def exchange(self, descriptor: int, names: list[str], timeout_s: float) -> dict[int, int]:
        """Send ``descriptor`` to every peer and return theirs by index; the caller closes them.

        Raises:
            ConfigurationError: A peer did not come before the deadline, or somebody else did.

        """
        received: dict[int, int] = {}
        with ExitStack() as on_error:
            try:
                for index, name in enumerate(names):
                    if index != self._index:
                        self._send(descriptor, name, timeout_s)
                while len(received) < self._size - 1:
                    index, peer_descriptor = self._receive(timeout_s)
                    on_error.callback(os.close, peer_descriptor)
                    if index in received or index == self._index or index >= self._size:
                        raise ConfigurationError(
                            f"a process that calls itself local rank {index} of {self._size} connected to "
                            f"{self.name}, where that one is not expected"
                        )
                    received[index] = peer_descriptor
            except OSError as error:
                missing = sorted(set(range(self._size)) - set(received) - {self._index})
                raise ConfigurationError(
                    f"local ranks with index {missing} did not share their memory within {timeout_s:g} s "
                    f"({error}); they must run on this host and in the same network namespace, or set "
                    "EFA_EP_RANKS_PER_NODE=1"
                ) from error
            on_error.pop_all()
        return received

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _send(self, descriptor: int, name: str, timeout_s: float) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(f"\0{name}")
            socket.send_fds(connection, [_INDEX.pack(self._index)], [descriptor])

    def _receive(self, timeout_s: float) -> tuple[int, int]:
        self._listener.settimeout(timeout_s)
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(timeout_s)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, user, _ = _CREDENTIALS.unpack(credentials)
            message, descriptors, _, _ = socket.recv_fds(connection, _INDEX.size, 1)
        if user != os.geteuid() or len(message) != _INDEX.size or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConfigurationError(
                f"a process of user {user} that is not part of this run connected to {self.name}"
            )
        return _INDEX.unpack(message)[0], descriptors[0]
