"""Bootstrap from a torch process group."""

import secrets
import socket
from collections.abc import Callable
from concurrent import futures
from threading import Thread
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vllm_efa_ep.errors import ConfigurationError, EfaEpError

_Answer = TypeVar("_Answer")
_ANSWER_SECONDS = 5.0


class TorchBootstrap:
    """Ranks of a torch process group whose backend moves CPU tensors, such as gloo."""

    def __init__(self, group: dist.ProcessGroup, store: Store | None = None) -> None:
        """Collective: use ``group``, and ``store`` (default: the one of ``torch.distributed``)."""
        self._group = group
        store = store if store is not None else dist.distributed_c10d._get_default_store()
        # Other groups and other instances may use the same store.
        name = self.all_gather(secrets.token_hex(8).encode())[0].decode()
        self._store = PrefixStore(f"vllm_efa_ep/{name}", store)

    @property
    def rank(self) -> int:
        """Rank in the group."""
        return dist.get_rank(self._group)

    @property
    def world_size(self) -> int:
        """Size of the group."""
        return dist.get_world_size(self._group)

    @property
    def address(self) -> str:
        """This host's address on the way to the host of the store."""
        store: Store = self._store
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        host = store.host if isinstance(store, TCPStore) else socket.gethostname()
        return address_towards(host)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over the group, within the group's timeout."""
        gathered: list[bytes] = [b""] * self.world_size
        try:
            dist.all_gather_object(gathered, payload, self._group)
        except RuntimeError as error:
            raise EfaEpError(f"a rank left while all of them were starting: {error}") from error
        return gathered

    def publish(self, key: str, value: str) -> None:
        """Set a key of the store."""
        self._ask(lambda: self._store.set(key, value))

    def lookup(self, key: str) -> str | None:
        """Get a key of the store if it is set."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _ask(self, request: Callable[[], _Answer]) -> _Answer:
        # In a thread of its own: a request to a store whose host is frozen never returns.
        answer: futures.Future[_Answer] = futures.Future()

        def run() -> None:
            try:
                answer.set_result(request())
            except RuntimeError as error:
                answer.set_exception(error)

        Thread(target=run, name="efa_ep_store", daemon=True).start()
        try:
            error = answer.exception(_ANSWER_SECONDS)
        except futures.TimeoutError:
            error = EfaEpError(f"nothing for {_ANSWER_SECONDS:g} s")
        if error is not None:
            raise EfaEpError(f"the store of torch.distributed does not answer: {error}")
        return answer.result()


def address_towards(host: str) -> str:
    """Return the address of this host that a packet to ``host`` would carry; sends none.

    Raises:
        ConfigurationError: There is no way to ``host``.

    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise ConfigurationError(
            f"this host does not know the way to {host}, its bootstrap: {error}"
        ) from error
    return address
