"""How the nodes of an examination find each other without Ray: through the store of one of them."""

from base64 import b64decode, b64encode
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bootstrap.torch import address_towards
from vllm_efa_ep.errors import ConfigurationError, EfaEpError


class StoreBootstrap:
    """A ``Bootstrap`` that needs a TCP connection to node 0 and nothing else: no process group, no names."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, timeout_s: float = 300.0) -> None:
        """Join; node 0 serves the store at ``host:port``.

        Raises:
            ConfigurationError: The others, or node 0, did not come before the deadline.

        """
        self._host = host
        self._rank = rank
        self._world_size = world_size
        self._gatherings = 0
        try:
            self._store = TCPStore(
                host, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"node {rank} of {world_size} did not meet the others at {host}:{port} in {timeout_s:g} s "
                f"({reason}); start the same command on all nodes, with --node 0 to {world_size - 1}, and "
                "name the address of node 0 in --meet"
            ) from error

    @property
    def rank(self) -> int:
        """This node."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of nodes."""
        return self._world_size

    @property
    def address(self) -> str:
        """This node's address on the way to node 0."""
        return address_towards(self._host)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Collective: return every node's payload.

        Raises:
            EfaEpError: A node did not come before the deadline.

        """
        self._gatherings += 1
        try:
            self._store.set(f"{self._gatherings}/{self._rank}", b64encode(payload).decode())
            keys = [f"{self._gatherings}/{node}" for node in range(self._world_size)]
            return [b64decode(self._store.get(key)) for key in keys]
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise EfaEpError(f"a node left while all were being examined: {reason}") from error

    def publish(self, key: str, value: str) -> None:
        """Set a value."""
        self._store.set(f"published/{key}", value)

    def lookup(self, key: str) -> str | None:
        """Get a value if it is set."""
        name = f"published/{key}"
        return self._store.get(name).decode() if self._store.check([name]) else None

    def leave(self) -> None:
        """Collective: node 0, which takes the store along, goes last."""
        if self._rank == 0:
            for node in range(1, self._world_size):
                self._store.get(f"left/{node}")
        else:
            self._store.set(f"left/{self._rank}", "")
