"""Rounds of an ``AllToAll`` on CUDA without a GPU: a program, run by test_cuda_rounds.py.

Everything is the product's, down to the kernels, which run on CPU fibers (a ``_core`` built with
``-DEFA_EP_CUDA=SIMT``). In the place of the driver is ``FakeDriver``; its device memory is memfds, which
efaemu registers by dma-buf; torch's tensors are CPU tensors over the same bytes.

    python cuda_on_fibers.py DIRECTORY_OF_CORE LIBFABRIC pinned|gdrcopy
"""

import ctypes
import importlib.util
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vllm_efa_ep

if TYPE_CHECKING:
    from fake_driver import FakeDriver

    from vllm_efa_ep import AllToAll
    from vllm_efa_ep.cuda.arena import DeviceView


def load_core(directory: Path) -> ctypes.CDLL:
    """Put the module with kernels on fibers in the place of the installed one."""
    (path,) = directory.glob("_core*.so")
    spec = importlib.util.spec_from_file_location("vllm_efa_ep._core", path)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = vllm_efa_ep._core = core
    spec.loader.exec_module(core)
    library = ctypes.CDLL(str(path))
    address, count = ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("simt_new_stream", address, ctypes.c_int),
        ("simt_synchronize", None),
        ("simt_fill_words", None, address, address, ctypes.c_uint32, count),
        ("simt_capture_begin", None, address),
        ("simt_capture_end", address, address),
        ("simt_graph_size", count, address),
        ("simt_graph_launch", None, address, address),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Streams:
    """What torch.cuda knows of streams and graphs."""

    def __init__(self, library: ctypes.CDLL, current: Callable[[], int] | None) -> None:
        """Make streams of the engine that is in ``library``: one per thread, or what ``current`` returns."""
        self._library = library
        self._of_thread = threading.local()
        self._current = current

    def current(self) -> int:
        """Return this thread's stream."""
        if self._current is not None:
            return self._current()
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = self._library.simt_new_stream(0)
        return self._of_thread.stream

    def is_capturing(self) -> bool:
        """Whether launches into this thread's stream are recorded."""
        return getattr(self._of_thread, "capturing", False)

    @contextmanager
    def capture(self) -> Iterator[list[int]]:
        """Record; the list gets the graph. The engine ends the process if somebody waits for the stream."""
        graph: list[int] = []
        self._library.simt_capture_begin(self.current())
        self._of_thread.capturing = True
        yield graph
        self._of_thread.capturing = False
        graph.append(self._library.simt_capture_end(self.current()))

    def size(self, graph: list[int]) -> int:
        """Return the number of a graph's launches."""
        return self._library.simt_graph_size(graph[0])

    def replay(self, graph: list[int]) -> None:
        """Launch what was recorded."""
        self._library.simt_graph_launch(graph[0], self.current())

    def fill(self, address: int, value: int, count: int, stream: int) -> None:
        """Do what cuMemsetD32Async does."""
        self._library.simt_fill_words(stream, address, value, count)


def fake_cuda(
    library: ctypes.CDLL, signals: str, stream: Callable[[], int] | None = None, eager: bool = True
) -> tuple[Streams, "FakeDriver"]:
    """Replace what touches a GPU: the driver, torch.cuda, sysfs and, for ``gdrcopy``, that library.

    ``stream`` returns the current one of a thread; by default each has its own. ``eager``: every half waits
    until its kernels are over; else the caller does, before it reads what they write.
    """
    from fake_driver import FakeDriver
    from pci_trees import build, lines_of

    from vllm_efa_ep import pci_topology
    from vllm_efa_ep.cuda import halves, rank_memory

    driver, streams = FakeDriver(), Streams(library, stream)
    driver.cuMemsetD32Async = streams.fill  # type: ignore[method-assign]
    driver.cuCtxSynchronize = library.simt_synchronize  # type: ignore[method-assign]
    driver.install()

    def synchronised(name: str) -> None:
        # What torch does with the tensors next would wait in the same stream.
        half = getattr(halves.CudaHalves, name)

        def call(self: halves.CudaHalves, *arguments: object) -> object:
            result = half(self, *arguments)
            if not streams.is_capturing():
                self._core.wait(streams.current())
            return result

        setattr(halves.CudaHalves, name, call)

    for name in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv") if eager else ():
        synchronised(name)
    halves.current_stream = streams.current
    halves.require_current = lambda ordinal: None  # noqa: ARG005
    halves.is_capturing = streams.is_capturing
    rank_memory.current_ordinal = lambda: 0
    rank_memory.current_device = lambda: torch.device("cpu")
    sysfs = build(Path(tempfile.mkdtemp()) / "sys", lines_of("p5"))
    rank_memory.gpu_affinity = lambda bus_id: replace(
        pci_topology.gpu_affinity(bus_id, sysfs), cpus=frozenset({0, 1})
    )
    rank_memory._tensor = as_cpu_tensor
    if signals == "gdrcopy":
        rank_memory.GdrCopy = WindowIntoFakeMemory
    return streams, driver


def as_cpu_tensor(view: "DeviceView", device: torch.device) -> torch.Tensor:  # noqa: ARG001
    """Return the bytes of a view of fake device memory."""
    interface = view.__cuda_array_interface__
    (size,), (address, _) = interface["shape"], interface["data"]
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


class WindowIntoFakeMemory:
    """GDRCopy where the CPU can write device memory anyway."""

    def map(self, address: int, size: int) -> int:  # noqa: ARG002
        """Return where it is."""
        return address

    def close(self) -> None:
        """Nothing to undo."""


def play_scenes(libfabric: str, signals: str) -> None:
    """Compare results with what the oracle knows."""
    from test_round import Scene, play
    from thread_world import settings_of

    from vllm_efa_ep import AllToAllConfig

    scenes = [
        (2, 2, AllToAllConfig(64, 8, 3, 12, device="cuda")),
        (1, 3, AllToAllConfig(64, 9, 2, 5, layout="per_expert", channels=2, device="cuda")),
        (2, 1, AllToAllConfig(48, 5, 4, 40, torch.float32, torch.float32, channels=2, device="cuda")),
        (3, 1, AllToAllConfig(128, 6, 2, 7, torch.float8_e4m3fn, scale_columns=1, device="cuda")),
        (2, 2, AllToAllConfig(64, 8, 3, 12, layout="per_expert", device="cuda")),
    ]
    for number, (nodes, ranks_per_node, config) in enumerate(scenes):
        for per_slot in (False, True):
            scene = Scene(nodes, ranks_per_node, config, 3, number, False, per_slot, per_slot, not per_slot)
            settings = settings_of(
                ranks_per_node,
                provider="efaemu",
                libfabric=libfabric,
                chunk_bytes=1000,
                gpu_signals=signals,
                gpu_handles="fabric" if signals == "gdrcopy" else "descriptor",
                num_sms=2,
            )
            play(scene, settings)
            print("played", nodes, ranks_per_node, config.layout, per_slot, flush=True)


def quantise_and_count(libfabric: str, signals: str) -> None:
    """Let kernels quantise tokens, and read how many there are."""
    from quantised_rounds import config_of, play
    from thread_world import ThreadBootstrap, outcomes_of_ranks, settings_of

    from vllm_efa_ep import AllToAll

    settings = settings_of(1, provider="efaemu", libfabric=libfabric, gpu_signals=signals, num_sms=2)
    for quantisation in ("fp8", "fp8_power_of_2", "fp8_ue8m0"):

        def body(bootstrap: ThreadBootstrap, quantisation: str = quantisation) -> None:
            with AllToAll(config_of(quantisation, "cuda"), bootstrap, settings) as all_to_all:
                play(all_to_all, 3)

        for outcome in outcomes_of_ranks(2, body):
            outcome.get()
        print("quantised", quantisation, flush=True)


def place_oddly(libfabric: str, signals: str) -> None:
    """Dispatch parts of other tensors; the engine ends the process at a misaligned access."""
    from placed_rounds import config_of, play_at_odd_addresses, play_over_activations
    from thread_world import run_world, settings_of

    def body(all_to_all: "AllToAll") -> None:
        play_over_activations(all_to_all)
        play_at_odd_addresses(all_to_all)

    for size, ranks_per_node in ((2, 2), (4, 2)):
        settings = settings_of(
            ranks_per_node, provider="efaemu", libfabric=libfabric, gpu_signals=signals, num_sms=2
        )
        run_world(config_of(size, "cuda"), size, settings, body)
        print("placed oddly:", size, ranks_per_node, flush=True)


def come_late(libfabric: str, signals: str) -> None:
    """Kernels take the times of all rounds but the newest, and name the rank for which they waited."""
    from test_times import LATE_RANK, LATE_S, ROUNDS, expect_samples, stats_of_rounds

    settings = {"provider": "efaemu", "libfabric": libfabric, "gpu_signals": signals, "num_sms": 1}
    for nodes, ranks_per_node, layout in ((1, 2, "per_token"), (2, 1, "per_expert"), (2, 2, "per_token")):
        of_ranks = stats_of_rounds(nodes, ranks_per_node, layout, LATE_S, "cuda", **settings)
        for stats in of_ranks:
            expect_samples(stats, ROUNDS - 1)
        # The engine's clock is at least a quarter as fast as the world's.
        late_s = 2 * (ROUNDS - 1) * LATE_S / 4
        assert of_ranks[0].waited_for_seconds[LATE_RANK] >= late_s
        assert sum(of_ranks[0].wait_seconds.values()) >= late_s
        print("came late:", nodes, ranks_per_node, layout, flush=True)


def time_out() -> None:
    """Let a rank wait for one that does not come: the kernel's deadline becomes the CPU's error."""
    from thread_world import ThreadBootstrap, outcomes_of_ranks, settings_of

    from vllm_efa_ep import AllToAll, AllToAllConfig
    from vllm_efa_ep.errors import RankTimeoutError

    config = AllToAllConfig(64, 4, 2, 4, device="cuda")

    def body(bootstrap: ThreadBootstrap) -> None:
        with AllToAll(config, bootstrap, settings_of(2, timeout_s=2.0, num_sms=2)) as all_to_all:
            assert not all_to_all.fault().item()
            if bootstrap.rank == 0:
                try:
                    all_to_all.dispatch(
                        torch.ones(1, 64).bfloat16(), torch.tensor([[0, 3]]), torch.ones(1, 2)
                    )
                finally:
                    assert all_to_all.fault().item()

    error = outcomes_of_ranks(2, body)[0].error
    assert isinstance(error, RankTimeoutError), error
    assert (error.half, error.round, error.missing) == ("dispatch_recv", 1, (1,)), error
    print("timed out:", error, flush=True)


def main() -> None:
    """Fake, then play."""
    directory, libfabric, signals = sys.argv[1:]
    fake_cuda(load_core(Path(directory)), signals)
    play_scenes(libfabric, signals)
    quantise_and_count(libfabric, signals)
    place_oddly(libfabric, signals)
    come_late(libfabric, signals)
    time_out()


if __name__ == "__main__":
    main()
