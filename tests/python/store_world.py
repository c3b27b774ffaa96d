"""Process worlds that outlive any of their ranks: the test hosts the store, and processes can be replaced."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from process_world import ProcessWorld, run_body

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.store import StoreBootstrap

RUN = Run("test", bytes(32))


def _main(
    line: Connection, rank: int, size: int, port: int, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    run_body(line, StoreBootstrap(store, RUN, rank, size), body, arguments)


class StoreWorld(ProcessWorld):
    """``size`` processes that run ``body(rank, *arguments)`` and know nothing but a store."""

    def __init__(self, size: int, body: Callable[..., Any], *arguments: Any) -> None:
        """Start the processes."""
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._size = size
        self._lines, self.processes = [], []
        for rank in range(size):
            line, process = self._start_rank(rank, body, *arguments)
            self._lines.append(line)
            self.processes.append(process)

    def replace(self, rank: int, body: Callable[..., Any], *arguments: Any) -> None:
        """Start another process for a rank whose process has ended, or is to be forgotten."""
        if self.processes[rank].is_alive():
            self.processes[rank].kill()
        self.processes[rank].join()
        self._lines[rank].close()
        self._lines[rank], self.processes[rank] = self._start_rank(rank, body, *arguments)

    def _start_rank(self, rank: int, body: Callable[..., Any], *arguments: Any) -> tuple[Connection, Any]:
        return self._start(_main, rank, self._size, self._store.port, body, arguments)
