"""Bootstrap from a key-value store of torch alone: no process group, so a process may come at any time."""

import atexit
import socket
import time
from concurrent import futures
from threading import Thread
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vllm_efa_ep.bootstrap.key_gather import KeyGather
from vllm_efa_ep.bootstrap.member import Member
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.sealed import SealedKeys
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, StoreLostError

_ANSWER_SECONDS = 5.0
# Threads of requests whose answer is still to come.
_asking: set[Thread] = set()


class StoreBootstrap(Member):
    """Ranks that know their numbers and share a store and a run.

    A process that takes the place of a lost one builds it with the ``run`` of the others' bootstrap.
    """

    def __init__(
        self, store: Store, run: Run, rank: int, world_size: int, gather_timeout_s: float = 300.0
    ) -> None:
        """Keep apart from whatever else uses the store, and from strangers who reach it."""
        super().__init__(run, rank, world_size)
        self._store = store
        self._keys = SealedKeys(store, run)
        self._gather = KeyGather(rank, world_size, gather_timeout_s)

    @property
    def address(self) -> str:
        """This host's address on the way to the host of the store."""
        store = self._store
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        host = store.host if isinstance(store, TCPStore) else socket.gethostname()
        return address_towards(host)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over keys."""
        return self._gather.all_gather(self, payload)

    def request(self, name: str, *arguments: str) -> Any:
        """Ask the store, in a thread of its own: a request to one whose host is frozen never returns."""
        answer: futures.Future[Any] = futures.Future()

        def run() -> None:
            try:
                answer.set_result(getattr(self._keys, name)(*arguments))
            except (RuntimeError, EfaEpError) as error:
                answer.set_exception(error)
            finally:
                _asking.discard(thread)

        thread = Thread(target=run, name="efa_ep_store", daemon=True)
        _asking.add(thread)
        thread.start()
        try:
            return answer.result(_ANSWER_SECONDS)
        except futures.TimeoutError:
            why = f"nothing for {_ANSWER_SECONDS:g} s"
        except RuntimeError as error:
            why = str(error)
        raise StoreLostError(
            f"the store of torch.distributed does not answer: {why}; its host (usually rank 0) is dead or "
            "stuck. Restart all ranks; a store outside of them survives each of them"
        )


@atexit.register
def _await_answers() -> None:
    """Give outstanding requests the time of an answer before the interpreter ends.

    A thread that comes back from the store into an interpreter that is being finalised is ended by
    ``pthread_exit``, inside torch's destructor that takes the lock again; that calls ``std::terminate``.
    https://docs.python.org/3.11/c-api/init.html#c.PyEval_RestoreThread
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    for thread in tuple(_asking):
        thread.join(max(0.0, deadline - time.monotonic()))


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
