"""How the nodes of an examination find each other without Ray: at a store that node 0 serves."""

from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import ConfigurationError

_NAME = "doctor"


class Meeting:
    """One node's part; its ``with`` block keeps node 0, and the store with it, until all others have left."""

    def __init__(self, host: str, port: int, node: int, nodes: int, timeout_s: float = 300.0) -> None:
        """Join the others at ``host:port``, which is node 0.

        Raises:
            ConfigurationError: The others, or node 0, did not come before the deadline.

        """
        try:
            self._store = TCPStore(
                host, port, nodes, is_master=node == 0, timeout=timedelta(seconds=timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"node {node} of {nodes} did not meet the others at {host}:{port} in {timeout_s:g} s "
                f"({reason}); start the same command on all nodes, with --node 0 to {nodes - 1}, and name "
                "the address of node 0 in --meet"
            ) from error
        self._node = node
        self._nodes = nodes
        self.bootstrap = StoreBootstrap(self._store, _NAME, node, nodes, timeout_s)

    def __enter__(self) -> "Meeting":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave: node 0 waits for all others, unless something went wrong."""
        if self._node > 0:
            self._store.set(f"left/{self._node}", "")
        elif kind is None:
            for node in range(1, self._nodes):
                self._store.get(f"left/{node}")
