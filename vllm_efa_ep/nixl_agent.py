"""An agent of NIXL (github.com/ai-dynamo/nixl): reads from other agents, with a deadline.

Only this module imports NIXL, and only when an agent is made: it is an extra, since its wheels are large.
"""

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_efa_ep.errors import ConfigurationError, FabricUnavailableError

logger = logging.getLogger(__name__)

_INFINIBAND = Path("/sys/class/infiniband")
# How often a rank that is read from looks after its connections. A look costs microseconds, NIXL's own
# progress thread a whole core.
_SERVICE_SECONDS = 0.002
_POLL_SECONDS = 0.0005


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

    def __init__(self, agent: Any, handle: Any, failures: tuple[type[Exception], ...]) -> None:
        """Take over a posted request."""
        self._agent = agent
        self._handle = handle
        self._failures = failures

    def state(self) -> str:
        """Return ``PROC`` while it runs, ``DONE``, or what went wrong."""
        try:
            state: str = self._agent.check_xfer_state(self._handle)
        except self._failures as error:
            return str(error)
        return "NIXL reports an error" if state == "ERR" else state

    def release(self) -> None:
        """Give its resources back; a transfer that still runs is cancelled as far as the network can."""
        try:
            self._handle.release()
        except self._failures as error:  # NIXL frees it with the agent
            logger.warning("EFA EP: NIXL keeps a transfer that could not be cancelled: %s", error)


class NixlAgent:
    """One process's end of NIXL, with a thread that answers other agents while this one computes."""

    def __init__(self, name: str, backend: str) -> None:
        """Start.

        Args:
            name: Unique in the world, and different after a restart.
            backend: ``UCX``, ``LIBFABRIC``, or ``auto``.

        Raises:
            FabricUnavailableError: NIXL is not installed, or its plug-in cannot be loaded.

        """
        self.backend = choose_backend(backend)
        api, bindings = _load()
        self._failures: tuple[type[Exception], ...] = tuple(
            each for each in vars(bindings).values() if isinstance(each, type) and issubclass(each, Exception)
        )
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            backends=[],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,  # for the service thread
        )
        self._agent = api.nixl_agent(name, config)
        try:
            self._agent.create_backend(self.backend, {})
        except self._failures as error:
            raise FabricUnavailableError(
                f"NIXL cannot load its plug-in {self.backend} ({error}). LIBFABRIC needs a libfabric 1.21 "
                "or newer, hwloc and the CUDA runtime; EFA_EP_NIXL_BACKEND=UCX works without, but not over "
                "EFA's SRD"
            ) from error
        self._registered: list[Any] = []
        self._stop = threading.Event()
        self._service = threading.Thread(target=self._serve, name="efa_ep_nixl", daemon=True)
        self._service.start()

    def register(self, region: Region, kind: str) -> None:
        """Let the network read and write a region of ``DRAM`` or ``VRAM``.

        Raises:
            ConfigurationError: It cannot.

        """
        try:
            self._registered.append(self._agent.register_memory([(*region, "")], kind, [self.backend]))
        except self._failures as error:
            raise ConfigurationError(
                f"NIXL's {self.backend} cannot register {region.size} bytes of {kind}: {error}; check "
                "`ulimit -l`"
            ) from error

    def metadata(self) -> bytes:
        """Return what other agents need to read what is registered so far."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def meet(self, metadata: bytes) -> str:
        """Learn about another agent, or what it has registered since; return its name.

        Raises:
            ConfigurationError: The metadata are not those of an agent with the same plug-in.

        """
        try:
            name: bytes | str = self._agent.add_remote_agent(metadata)
        except self._failures as error:
            raise ConfigurationError(
                f"NIXL does not accept another rank's metadata ({error}); all ranks need the same NIXL and "
                "the same EFA_EP_NIXL_BACKEND"
            ) from error
        return name.decode() if isinstance(name, bytes) else name

    def read(self, peer: str, remote: Sequence[Region], local: Sequence[Region], kind: str) -> Read | str:
        """Start to read regions of a peer, as one transfer; return it, or why it cannot start."""
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(list(map(tuple, local)), kind),
                self._agent.get_xfer_descs(list(map(tuple, remote)), kind),
                peer,
                backends=[self.backend],
            )
            self._agent.transfer(handle)
        except self._failures as error:
            return str(error)
        return Read(self._agent, handle, self._failures)

    def close(self) -> None:
        """Stop answering and forget all memory; safe to repeat."""
        self._stop.set()
        self._service.join()
        while self._registered:
            self._agent.deregister_memory(self._registered.pop(), [self.backend])

    def _serve(self) -> None:
        while not self._stop.wait(_SERVICE_SECONDS):
            try:
                self._agent.get_new_notifs([self.backend])
            except self._failures as error:
                logger.error(
                    "EFA EP: NIXL stopped answering other ranks, who cannot read expert weights: %s", error
                )
                return


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
