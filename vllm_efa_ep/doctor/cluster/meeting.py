"""How the nodes of an examination find each other without Ray: at a store that node 0 serves.

What they say there only those can read, or say, who have the same token.
"""

import hashlib
import time
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bootstrap.run import Run, read_secret
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import ConfigurationError, RankTimeoutError

_NAME = "doctor"
_POLL_SECONDS = 0.02


def run_of(token_file: Path) -> Run:
    """Return the run of those who have this file.

    Raises:
        ConfigurationError: It cannot be read, or holds too little to be a secret.

    """
    secret = read_secret(token_file, "--token-file")
    return Run(_NAME, hashlib.sha256(secret).digest())


class Meeting:
    """One node's part; its ``with`` block keeps node 0, and the store with it, until all others have left."""

    def __init__(
        self, host: str, port: int, node: int, nodes: int, run: Run, timeout_s: float = 300.0
    ) -> None:
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
        self._node, self._nodes, self._timeout_s = node, nodes, timeout_s
        self.bootstrap = StoreBootstrap(self._store, run, node, nodes, timeout_s)

    def __enter__(self) -> "Meeting":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave: node 0 waits for all others, unless something went wrong."""
        if self._node > 0:
            self.bootstrap.publish(f"left/{self._node}", "")
        elif kind is None:
            self._await_the_others()

    def _await_the_others(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        for node in range(1, self._nodes):
            while self.bootstrap.lookup(f"left/{node}") is None:
                if time.monotonic() > deadline:
                    raise RankTimeoutError(
                        f"node {node} did not leave within {self._timeout_s:g} s; look at its output",
                        missing=(node,),
                    )
                time.sleep(_POLL_SECONDS)
