"""Worlds whose ranks are real processes joined by torch.distributed (gloo), for what threads cannot show.

Processes are forked from a server that has imported torch once, so a world starts in a fraction of a second.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from thread_world import DEADLINE_S

from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.bootstrap.torch import TorchBootstrap

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "vllm_efa_ep.all_to_all"])


class Rank:
    """What a rank's body gets: its bootstrap, and a line to the test."""

    def __init__(self, bootstrap: StoreBootstrap, line: Connection) -> None:
        """Keep both."""
        self.bootstrap = bootstrap
        self._line = line

    def tell(self, event: str) -> None:
        """Let the test know that something happened."""
        self._line.send(("event", event))

    def await_go(self) -> None:
        """Wait until the test says so."""
        assert self._line.poll(DEADLINE_S), "the test never said go"
        self._line.recv()


@dataclass(frozen=True)
class Ended:
    """How a rank's body ended: with a value, or with an error."""

    value: Any = None
    error: str | None = None
    message: str = ""


def _main(
    line: Connection, rank: int, size: int, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        line.send(("port", store.port))
    else:
        store = dist.TCPStore("127.0.0.1", line.recv(), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    # The store lives in rank 0, so nobody leaves before the test has heard everybody it waits for.
    run_body(line, TorchBootstrap(dist.group.WORLD, store), body, arguments)


def run_body(
    line: Connection, bootstrap: StoreBootstrap, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Run a rank's body, tell the test how it ended, and wait for the test to let this process end."""
    try:
        ended = Ended(body(Rank(bootstrap, line), *arguments))
    except BaseException as error:  # handed to the test, whatever it is
        ended = Ended(None, type(error).__name__, str(error))
    line.send(("ended", ended))
    line.poll(DEADLINE_S)


class ProcessWorld:
    """``size`` processes that run ``body(rank, *arguments)``; its ``with`` block ends them all."""

    def __init__(self, size: int, body: Callable[..., Any], *arguments: Any) -> None:
        """Start the processes."""
        self._lines: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            line, process = self._start(_main, rank, size, body, arguments)
            self._lines.append(line)
            self.processes.append(process)
        port = self._next(0, "port")
        for line in self._lines[1:]:
            line.send(port)

    @staticmethod
    def _start(main: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
        """Start a process with a line to it as its first argument."""
        near, far = _context.Pipe()
        process = _context.Process(target=main, args=(far, *arguments), daemon=True)
        process.start()
        far.close()
        return near, process

    def __enter__(self) -> "ProcessWorld":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()  # reaches stopped processes as well
        for process in self.processes:
            process.join(DEADLINE_S)
        for line in self._lines:
            line.close()

    def hear(self, rank: int, event: str) -> None:
        """Wait until ``rank`` tells ``event``."""
        assert self._next(rank, "event") == event

    def go(self, rank: int) -> None:
        """Let ``rank`` return from ``await_go``."""
        self._lines[rank].send("go")

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal; return once SIGKILL or SIGSTOP has taken effect on all threads."""
        process = self.processes[rank]
        assert process.pid is not None
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.join(DEADLINE_S)
        if number == signal.SIGSTOP:
            deadline = time.monotonic() + DEADLINE_S
            while not _is_stopped(process.pid):
                assert time.monotonic() < deadline, f"rank {rank} does not stop"
                threading.Event().wait(0.001)

    def ended(self, rank: int, patience_s: float = DEADLINE_S) -> Ended:
        """Wait until the body of ``rank`` ends."""
        return self._next(rank, "ended", patience_s)  # type: ignore[no-any-return]

    def exit_codes(self, ranks: list[int]) -> list[int | None]:
        """Let ``ranks``, whose bodies have ended, exit, and return their exit codes."""
        for rank in ranks:
            self.go(rank)
        deadline = time.monotonic() + DEADLINE_S
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def _next(self, rank: int, kind: str, patience_s: float = DEADLINE_S) -> Any:
        line = self._lines[rank]
        assert line.poll(patience_s), f"rank {rank} said nothing for {patience_s:g} s; {kind} was expected"
        try:
            got_kind, value = line.recv()
        except EOFError:
            raise AssertionError(f"rank {rank} died without a word; {kind} was expected") from None
        assert got_kind == kind, f"rank {rank} said {got_kind} {value!r}; {kind} was expected"
        return value


def _is_stopped(pid: int) -> bool:
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # a thread has just ended
        return False
    # The state follows the name, which is in parentheses.
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def run_processes(size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a world to its end and return the ranks' values."""
    with ProcessWorld(size, body, *arguments) as world:
        ended = [world.ended(rank) for rank in range(size)]
        failed = [
            f"rank {rank}: {e.error}: {e.message}" for rank, e in enumerate(ended) if e.error is not None
        ]
        assert not failed, "; ".join(failed)
        assert world.exit_codes(list(range(size))) == [0] * size
        return [e.value for e in ended]
