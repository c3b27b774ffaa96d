"""Passing file descriptors between the ranks of one node, so that they can map each other's memory."""

import os
import secrets
import socket
import struct
from contextlib import ExitStack, closing

from vllm_efa_ep.bootstrap.admission import Caller, callers
from vllm_efa_ep.bootstrap.run import TOKEN_BYTES, is_member, new_token
from vllm_efa_ep.errors import ConfigurationError

_HELLO = struct.Struct(f"={TOKEN_BYTES}sI")


class DescriptorExchange:
    """One rank's end: an abstract Unix socket, which leaves nothing behind in any file system.

    Build it, let the peers know ``invitation`` by other means, then call ``exchange`` and ``close``. Every
    process of the network namespace can see the socket's name, so the invitation has a token beside it.
    """

    def __init__(self, index: int, size: int) -> None:
        """Listen for the other ``size - 1`` ranks of the node; ``index`` is this rank's place among them."""
        self._index = index
        self._size = size
        self._name = f"vllm-efa-ep-{secrets.token_hex(16)}"
        self._token = new_token()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{self._name}")
        self._listener.listen(socket.SOMAXCONN)

    @property
    def invitation(self) -> str:
        """What a peer needs to connect; a secret of the run."""
        return f"{self._name} {self._token.hex()}"

    def exchange(self, descriptor: int, invitations: list[str], timeout_s: float) -> dict[int, int]:
        """Send ``descriptor`` to every peer and return theirs by index; the caller closes them.

        Strangers that connect are turned away.

        Raises:
            ConfigurationError: A peer did not come before the deadline.

        """
        received: dict[int, int] = {}
        missing = set(range(self._size)) - {self._index}
        with ExitStack() as on_error:
            try:
                for index in missing:
                    self._send(descriptor, invitations[index], timeout_s)
                with closing(callers(self._listener, _HELLO.size, timeout_s)) as knocking:
                    while missing:
                        admitted = self._admit(next(knocking), missing)
                        for each in admitted.values():
                            on_error.callback(os.close, each)
                        received |= admitted
                        missing -= admitted.keys()
            except OSError as error:
                raise ConfigurationError(
                    f"local ranks with index {sorted(missing)} did not share their memory within "
                    f"{timeout_s:g} s ({error}); they must run on this host and in the same network "
                    "namespace, or set EFA_EP_RANKS_PER_NODE=1"
                ) from error
            on_error.pop_all()
        return received

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _send(self, descriptor: int, invitation: str, timeout_s: float) -> None:
        try:
            name, token = invitation.split()
            hello = _HELLO.pack(bytes.fromhex(token), self._index)
        except ValueError:
            raise ConfigurationError(f"a local rank sent {invitation!r}, which is no invitation") from None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(f"\0{name}")
            socket.send_fds(connection, [hello], [descriptor])

    def _admit(self, caller: Caller, missing: set[int]) -> dict[int, int]:
        """Return the descriptor that a missing peer sent, by the peer's index; nothing for anybody else."""
        token, index = _HELLO.unpack(caller.hello) if len(caller.hello) == _HELLO.size else (b"", -1)
        if not caller.is_same_user or not is_member(token, self._token) or index not in missing:
            caller.turn_away("it is not one of the ranks that this rank shares memory with")
            return {}
        if len(caller.descriptors) != 1:
            caller.turn_away(f"it sent {len(caller.descriptors)} descriptors instead of one")
            return {}
        descriptor = caller.descriptors.pop()
        caller.close()
        return {index: descriptor}
