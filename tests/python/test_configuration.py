"""Starts that cannot work: every rank raises an error with value, limit and remedy, and nothing stays."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from process_world import Rank, run_processes
from thread_world import (
    DEADLINE_S,
    Outcome,
    ThreadBootstrap,
    outcomes_of_ranks,
    run_ranks,
    run_world,
    settings_of,
    until,
)

from vllm_efa_ep import (
    AllToAll,
    AllToAllConfig,
    __version__,
    all_to_all,
    connection,
    generation,
    rank_memory,
    world,
)
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    FabricUnavailableError,
    ProtocolError,
    RankLostError,
)
from vllm_efa_ep.generation import Generation

_CONFIG = AllToAllConfig(64, 8, 2, 16, scale_columns=2)
_SETTINGS = settings_of(ranks_per_node=1)


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Check that no descriptor, mapping or thread stays behind.

    For whoever has joined a thread it has ended a moment before it has for the kernel.
    """

    def open_things() -> tuple[list[str], int]:
        maps = Path("/proc/self/maps").read_text()
        return sorted(path.name for path in Path("/proc/self/fd").iterdir()), maps.count("efa_ep_arena")

    def threads() -> int:
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir()))

    threads_before, before = threads(), open_things()
    yield
    assert until(lambda: threads() <= threads_before), "threads stay behind"
    assert open_things() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 60}, ["60 x torch.bfloat16", "120 bytes", "multiple of 8"]),
        ({"hidden_size": 0}, ["hidden_size is 0", "1 to"]),
        ({"hidden_size": 64.0}, ["hidden_size is 64.0, no integer", "1 to"]),
        ({"top_k": None}, ["top_k is None, no integer", "1 to 32"]),
        ({"payload_columns": "64"}, ["payload_columns is '64', no integer", "1 to"]),
        ({"num_experts": 0}, ["num_experts is 0", "1 to 4096"]),
        ({"num_experts": 4097}, ["num_experts is 4097", "1 to 4096"]),
        ({"top_k": 0}, ["top_k is 0", "1 to 32"]),
        ({"top_k": 33}, ["top_k is 33", "1 to 32"]),
        ({"max_tokens_per_rank": 0}, ["max_tokens_per_rank is 0", "1 to 65535"]),
        ({"max_tokens_per_rank": 65536}, ["max_tokens_per_rank is 65536", "1 to 65535"]),
        ({"channels": 0}, ["channels is 0", "1 to 2"]),
        ({"channels": 3}, ["channels is 3", "1 to 2"]),
        ({"scale_columns": -1}, ["scale_columns is -1", "0 to"]),
        ({"payload_columns": 0}, ["payload_columns is 0", "1 to"]),
        ({"payload_columns": 7, "dtype": torch.uint8}, ["7 x torch.uint8", "multiple of 16"]),
        ({"dtype": torch.int64}, ["dtype is torch.int64", "torch.bfloat16", "torch.float8_e4m3fn"]),
        ({"combine_dtype": torch.float64}, ["combine_dtype is torch.float64", "torch.float32"]),
        ({"layout": "batched"}, ["layout is 'batched'", "per_token", "per_expert"]),
        (
            {"expert_to_rank": (0,) * 7},
            ["expert_to_rank has 7 entries for 8 experts", "one owner per expert"],
        ),
        ({"expert_to_rank": (0, 1, 2, 0, 0, 0, 0, 0)}, ["expert_to_rank[2] is 2", "0 to 1"]),
        ({"expert_to_rank": (0, 1, 0, -1, 0, 0, 0, 0)}, ["expert_to_rank[3] is -1", "0 to 1"]),
    ],
)
def test_a_bad_configuration_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    """By all ranks, before anything is allocated, and by the memory plan."""
    config = replace(_CONFIG, **changes)
    with _nothing_left():
        errors = [str(outcome.error) for outcome in _start(2, config) if _refused(outcome)]
    with pytest.raises(ConfigurationError) as planned:
        config.memory_plan(2, 1)
    assert len(errors) == 2
    for text in (*errors, str(planned.value)):
        for word in words:
            assert word in text


def _refused(outcome: Outcome[None]) -> bool:
    return isinstance(outcome.error, ConfigurationError)


def _start(
    size: int,
    config: AllToAllConfig | Callable[[int], AllToAllConfig] = _CONFIG,
    settings: Settings | Callable[[int], Settings] = _SETTINGS,
    bootstrap_of: Callable[[ThreadBootstrap], ThreadBootstrap] = lambda bootstrap: bootstrap,
) -> list[Outcome[None]]:
    """Build and close an instance on every rank."""

    def body(bootstrap: ThreadBootstrap) -> None:
        rank = bootstrap.rank
        own_config = config if isinstance(config, AllToAllConfig) else config(rank)
        own_settings = settings if isinstance(settings, Settings) else settings(rank)
        AllToAll(own_config, bootstrap_of(bootstrap), own_settings).close()

    return outcomes_of_ranks(size, body)


def test_a_closed_instance_refuses_everything() -> None:
    """Closing twice is fine."""

    def body(all_to_all: AllToAll) -> None:
        x, ids, weights, scales = (
            torch.ones(1, 64, dtype=torch.bfloat16),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.ones(1, 2),
            torch.ones(1, 2),
        )
        handle = all_to_all.dispatch_send(x, ids, weights, scales)
        all_to_all.combine(all_to_all.dispatch_recv(handle).x, handle)
        all_to_all.close()
        all_to_all.close()
        for call in (
            lambda: all_to_all.dispatch_send(x, ids, weights, scales),
            lambda: all_to_all.dispatch_recv(handle),
            lambda: all_to_all.combine_recv(handle),
            all_to_all.stats,
        ):
            with pytest.raises(ConfigurationError, match="closed; build a new one"):
                call()

    with _nothing_left():
        run_world(_CONFIG, 2, settings_of(1), body)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_tokens_per_rank": 17}, "max_tokens_per_rank"),
        ({"hidden_size": 128}, "hidden_size"),
        ({"dtype": torch.float16}, "dtype"),
        ({"layout": "per_expert"}, "layout"),
        ({"expert_to_rank": (0, 1) * 4}, "expert_to_rank"),
        ({"channels": 2}, "channels"),
    ],
)
def test_ranks_with_unequal_configurations_are_refused(change: dict[str, Any], name: str) -> None:
    """All ranks name the value and both sides."""
    other = replace(_CONFIG, **change)
    with _nothing_left():
        outcomes = _start(3, lambda rank: other if rank == 2 else _CONFIG)
        _all_say(outcomes, [f"ranks disagree about {name}", "rank 0 has", "rank 2 has"])
        del outcomes


def test_close_frees_all_even_if_the_others_break_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised once."""

    def broken(*_: Any) -> None:
        raise ProtocolError("a stale writer")

    monkeypatch.setattr(Generation, "finish", broken)

    def body(bootstrap: ThreadBootstrap) -> None:
        all_to_all = AllToAll(_CONFIG, bootstrap, _SETTINGS)
        with pytest.raises(ProtocolError, match="a stale writer"):
            all_to_all.close()
        all_to_all.close()

    with _nothing_left():
        run_ranks(2, body)


def _all_say(outcomes: list[Outcome[None]], words: list[str]) -> None:
    for outcome in outcomes:
        assert _refused(outcome), outcome
        for word in words:
            assert word in str(outcome.error)


def test_ranks_with_unequal_settings_are_refused() -> None:
    """Where the protocol needs equal values, also through the fabric's addresses."""
    with _nothing_left():
        chunks = _start(2, settings=lambda rank: settings_of(1, chunk_bytes=1000 + rank))
        _all_say(chunks, ["EFA_EP_CHUNK_BYTES", "rank 0 has 1000", "rank 1 has 1001"])
        nodes = _start(2, settings=lambda rank: settings_of(1 + rank))
        _all_say(nodes, ["EFA_EP_RANKS_PER_NODE", "rank 0 has 1", "rank 1 has 2"])
        nics = _start(2, settings=lambda rank: settings_of(1, nics_per_rank=1 + rank))
        assert all(isinstance(outcome.error, EfaEpError) for outcome in nics)
        assert any("NIC" in str(outcome.error) or "rail" in str(outcome.error) for outcome in nics)
        del chunks, nodes, nics


def test_ranks_with_unequal_versions_are_refused() -> None:
    """A rank of another release may speak another protocol."""

    def as_other_release(bootstrap: ThreadBootstrap) -> Any:
        def all_gather(payload: bytes) -> list[bytes]:
            return bootstrap.all_gather(payload.replace(f'"{__version__}"'.encode(), b'"0.0.0"'))

        own = {"rank": bootstrap.rank, "world_size": bootstrap.world_size, "all_gather": all_gather}
        return SimpleNamespace(**own) if bootstrap.rank == 1 else bootstrap

    _all_say(_start(2, bootstrap_of=as_other_release), ["version", "rank 1 has '0.0.0'"])


def test_two_ranks_with_one_id_are_refused() -> None:
    """All ranks name both."""
    outcomes = _start(3, bootstrap_of=lambda bootstrap: bootstrap.claiming(bootstrap.rank % 2))
    _all_say(outcomes, ["claim rank 0", "numbers 0 and 2"])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"provider": "nonesuch"}, ConfigurationError, ['EFA_EP_PROVIDER is "nonesuch"', "tcp"]),
        ({"interface": "nonesuch"}, ConfigurationError, ['EFA_EP_INTERFACE is "nonesuch"', "lo"]),
        ({"nics_per_rank": 65}, ConfigurationError, ["EFA_EP_NICS_PER_RANK is 65", "64"]),
        (
            {"libfabric": "/nonexistent/libfabric.so.1"},
            FabricUnavailableError,
            ["/nonexistent/libfabric.so.1"],
        ),
    ],
)
@pytest.mark.parametrize("culprits", [{1}, {0, 1, 2}])
def test_an_unusable_network_fails_all_ranks(
    culprits: set[int], settings: dict[str, Any], error: type[EfaEpError], words: list[str]
) -> None:
    """On one rank only, or everywhere."""
    with _nothing_left():
        outcomes = _start(3, settings=lambda rank: settings_of(1, **settings if rank in culprits else {}))
        for rank, outcome in enumerate(outcomes):
            if rank in culprits:
                assert isinstance(outcome.error, error), outcome
            else:
                _all_say(
                    [outcome], ["opening the fabric failed", *(f"rank {culprit}" for culprit in culprits)]
                )
            for word in words:
                assert word in str(outcome.error)
        del outcomes, outcome


@pytest.mark.parametrize(
    ("module", "name"),
    [(all_to_all, "OutputBuffers"), (generation, "results"), (connection, "least_delays_ns")],
)
def test_a_rank_that_fails_once_it_is_connected_is_noticed(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It closes its connections, so nobody waits for the deadline."""

    def body(bootstrap: ThreadBootstrap) -> None:
        # One node: without connections that the fabric makes while it is closed.
        never = settings_of(2, timeout_s=100 * DEADLINE_S, trace=str(tmp_path))
        with AllToAll(_CONFIG, bootstrap, never) as all_to_all:
            arguments = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.ones(1, 2)
            all_to_all.dispatch(torch.ones(1, 64, dtype=torch.bfloat16), *arguments)

    with _nothing_left(), monkeypatch.context() as patch:
        patch.setattr(module, name, _FailsOnRank1(getattr(module, name), ()))
        outcomes = outcomes_of_ranks(2, body)
        assert isinstance(outcomes[1].error, OSError)
        if module is connection:  # rank 0 still gathers
            assert isinstance(outcomes[0].error, EfaEpError)
        else:
            assert isinstance(outcomes[0].error, RankLostError)
            assert outcomes[0].error.rank == 1
        del outcomes


def _missing_library(rank: Rank) -> str:
    with pytest.raises(FabricUnavailableError) as missing:
        AllToAll(_CONFIG, rank.bootstrap, settings_of(1, libfabric="/nonexistent/libfabric.so.1"))
    return str(missing.value)


def test_a_missing_library_is_named_with_the_remedy() -> None:
    """In processes that have no libfabric open yet."""
    for text in run_processes(2, _missing_library):
        assert "no usable libfabric: /nonexistent/libfabric.so.1" in text
        assert "EFA_EP_LIBFABRIC" in text


class _FailsOnRank1:
    """Stands for an object; on the thread of rank 1, calls of some of its attributes, or of itself, fail."""

    def __init__(self, real: Any, failing: tuple[str, ...]) -> None:
        """Fail calls of the attribute at the path ``failing``."""
        self._real = real
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        """Return the real attribute unless it leads to the failing one."""
        real = getattr(self._real, name)
        return _FailsOnRank1(real, self._failing[1:]) if name == self._failing[0] else real

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the real one, or fail."""
        if threading.current_thread().name == "rank 1":
            raise OSError("bad luck")
        return self._real(*arguments, **named)


@pytest.mark.parametrize(
    ("step", "module", "name", "failing"),
    [
        ("joining", world, "host_identity", ""),
        ("allocating memory", connection, "DescriptorExchange", ""),
        ("allocating memory", rank_memory, "_core", "Arena.create"),
        ("sharing memory inside the node", rank_memory, "_core", "Arena.map"),
        ("opening the fabric", connection, "_core", "LibfabricFabric"),
        ("connecting the rails", connection, "_core", "Proxy"),
    ],
)
def test_a_rank_that_fails_in_a_step_of_the_start_fails_all(
    step: str, module: Any, name: str, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks raise; those that could go on name the step, the rank and its reason."""
    path = tuple(filter(None, failing.split(".")))
    with _nothing_left(), monkeypatch.context() as patch:
        patch.setattr(module, name, _FailsOnRank1(getattr(module, name), path))
        outcomes = _start(4, settings=settings_of(2))
        assert isinstance(outcomes[1].error, OSError)
        _all_say([outcomes[0], *outcomes[2:]], [f"{step} failed", "rank 1: OSError: bad luck"])
        del outcomes
