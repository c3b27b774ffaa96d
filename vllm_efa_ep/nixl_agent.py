"""An agent of NIXL (github.com/ai-dynamo/nixl): reads from other agents, with a deadline.

Only this module imports NIXL, and only when an agent is made: it is an extra, since its wheels are large.
"""

import importlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from vllm_efa_ep.errors import ConfigurationError, FabricUnavailableError

logger = logging.getLogger(__name__)

_INFINIBAND = Path("/sys/class/infiniband")
# How often a rank that is read from looks after its connections. A look costs microseconds, NIXL's own
# progress thread a whole core.
_SERVICE_SECONDS = 0.002
_POLL_SECONDS = 0.0005
# A call takes microseconds; one that takes this long beyond its deadline will not return.
_STUCK_SECONDS = 5.0


class Region(NamedTuple):
    """A run of bytes.

    Attributes:
        address: Its first byte.
        size: Bytes.
        device: CUDA device, 0 for host memory.

    """

    address: int
    size: int
    device: int


class Read:
    """A transfer in flight; release it, also when it failed."""

    def __init__(self, agent: "NixlAgent", handle: Any) -> None:
        """Take over a posted request."""
        self._agent = agent
        self._handle = handle

    def state(self, deadline: float) -> str:
        """Return ``PROC`` while it runs, ``DONE``, or what went wrong."""
        state = self._agent.attempt(lambda nixl: nixl.check_xfer_state(self._handle), deadline)
        return "NIXL reports an error" if state == "ERR" else str(state)

    def release(self) -> None:
        """Give its resources back; a transfer that still runs is cancelled as far as the network can."""
        self._agent.later(lambda _: self._handle.release())


class NixlAgent:
    """One process's end of NIXL.

    A thread of its own makes all calls, for two reasons. Between them it answers other agents, who may read
    while this process computes. And a call into NIXL can block for ever (its LIBFABRIC posts to a dead peer
    until the post succeeds); then only this thread is lost, and the caller has a deadline.
    """

    def __init__(self, name: str, backend: str, timeout_s: float) -> None:
        """Start.

        Args:
            name: Unique in the world, and different after a restart.
            backend: ``UCX``, ``LIBFABRIC``, or ``auto``.
            timeout_s: Deadline of calls that are given none.

        Raises:
            FabricUnavailableError: NIXL is not installed, or its plug-in cannot be loaded.

        """
        self.backend = choose_backend(backend)
        self._timeout_s = timeout_s
        api, bindings = _load()
        self._failures: tuple[type[Exception], ...] = tuple(
            each for each in vars(bindings).values() if isinstance(each, type) and issubclass(each, Exception)
        )
        self._nixl = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        try:
            self._nixl.create_backend(self.backend, {})
        except self._failures as error:
            raise FabricUnavailableError(
                f"NIXL cannot load its plug-in {self.backend} ({error}). LIBFABRIC needs a libfabric 1.21 or "
                "newer, hwloc and the CUDA runtime; EFA_EP_NIXL_BACKEND=UCX works without, but not over "
                "EFA's SRD"
            ) from error
        self._registered: list[tuple[Any, object]] = []
        self._stuck = False
        self._closed = False
        self._jobs: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="efa_ep_nixl", daemon=True)
        self._thread.start()

    def register(self, region: Region, kind: str, owner: object) -> None:
        """Let the network read and write a region of ``DRAM`` or ``VRAM``; ``owner`` lives as long.

        Raises:
            ConfigurationError: It cannot.

        """

        def register(nixl: Any) -> None:
            self._registered.append((nixl.register_memory([(*region, "")], kind, [self.backend]), owner))

        problem = self.attempt(register, self._deadline())
        if problem is not None:
            raise ConfigurationError(
                f"NIXL's {self.backend} cannot register {region.size} bytes of {kind}: {problem}; check "
                "`ulimit -l`"
            )

    def metadata(self) -> bytes:
        """Return what other agents need to read what is registered so far.

        Raises:
            FabricUnavailableError: NIXL does not say.

        """
        metadata = self.attempt(lambda nixl: nixl.get_agent_metadata(), self._deadline())
        if not isinstance(metadata, bytes):
            raise FabricUnavailableError(f"NIXL does not describe its memory: {metadata}")
        return metadata

    def meet(self, metadata: bytes, deadline: float) -> str:
        """Learn about another agent, or what it has registered since; return its name.

        Raises:
            ConfigurationError: The metadata are not those of an agent with the same plug-in.

        """
        name = self.attempt(lambda nixl: nixl.add_remote_agent(metadata), deadline)
        if not isinstance(name, bytes):
            raise ConfigurationError(
                f"NIXL does not accept another rank's metadata ({name}); all ranks need the same NIXL and "
                "the same EFA_EP_NIXL_BACKEND"
            )
        return name.decode()

    def read(
        self, peer: str, remote: Sequence[Region], local: Sequence[Region], kind: str, deadline: float
    ) -> Read | str:
        """Start to read regions of a peer, as one transfer; return it, or why it cannot start."""

        def post(nixl: Any) -> Read:
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs(list(map(tuple, local)), kind),
                nixl.get_xfer_descs(list(map(tuple, remote)), kind),
                peer,
                backends=[self.backend],
            )
            nixl.transfer(handle)
            return Read(self, handle)

        posted: Read | str = self.attempt(post, deadline)
        return posted

    def attempt(self, job: Callable[[Any], Any], deadline: float) -> Any:
        """Let the thread call NIXL; return the result, or in words what went wrong.

        Raises:
            ConfigurationError: The agent is closed.
            FabricUnavailableError: This call is stuck, or an earlier one.

        """
        self.require_alive()
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        try:
            return future.result(max(0.0, deadline - time.monotonic()) + _STUCK_SECONDS)
        except self._failures as error:
            return str(error)
        except futures.TimeoutError:
            self._stuck = True
            self.require_alive()

    def require_alive(self) -> None:
        """Raise ``ConfigurationError`` after ``close``, and ``FabricUnavailableError`` if a call is stuck."""
        if self._closed:
            raise ConfigurationError("this ExpertTransfer is closed; build a new one")
        if self._stuck:
            raise FabricUnavailableError(
                "NIXL has not come back from a call in time; build a new ExpertTransfer"
            )

    def later(self, job: Callable[[Any], Any]) -> None:
        """Let the thread call NIXL, and wait for nothing; a failure is logged."""

        def log(done: "Future[Any]") -> None:
            if done.exception() is not None:
                logger.warning(
                    "EFA EP: NIXL keeps a transfer that could not be cancelled: %s", done.exception()
                )

        if self._stuck or self._closed:
            return
        future: Future[Any] = Future()
        future.add_done_callback(log)
        self._jobs.put((job, future))

    def close(self) -> None:
        """Stop answering and forget all memory; safe to repeat. A thread that is stuck keeps the memory."""
        self._closed = True
        if not self._stuck and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            logger.warning("EFA EP: NIXL is stuck in a call; it keeps its memory until this process ends")

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_SERVICE_SECONDS)
            except Empty:
                self._answer()
                continue
            if job is None:
                break
            call, future = job
            try:
                future.set_result(call(self._nixl))
            except Exception as error:  # for the caller, whatever it is
                future.set_exception(error)
        while self._registered:
            self._nixl.deregister_memory(self._registered.pop()[0], [self.backend])

    def _answer(self) -> None:
        try:
            self._nixl.get_new_notifs([self.backend])
        except self._failures as error:
            logger.error(
                "EFA EP: NIXL does not answer other ranks, who cannot read expert weights: %s", error
            )


def choose_backend(backend: str, infiniband: Path = _INFINIBAND) -> str:
    """Return the plug-in for ``EFA_EP_NIXL_BACKEND``: what it says, or what fits the devices of this host."""
    if backend != "auto":
        return backend
    drivers = {driver.resolve().name for driver in infiniband.glob("*/device/driver")}
    return "LIBFABRIC" if "efa" in drivers else "UCX"


def wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    """Poll until ``condition`` holds; return whether it did before ``deadline`` (``time.monotonic``)."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _load() -> tuple[Any, Any]:
    # The libnl inside NIXL's UCX crashes when a process that has loaded it ends; without InfiniBand nobody
    # needs it.
    if not _INFINIBAND.exists() or not any(_INFINIBAND.iterdir()):
        os.environ.setdefault("UCX_MODULES", "^ib")
    try:
        api, bindings = importlib.import_module("nixl._api"), importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise FabricUnavailableError(
            f"NIXL, which moves expert weights, cannot be imported: {error}; pip install 'vllm-efa-ep[nixl]'"
        ) from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it prints to stdout otherwise
    return api, bindings
