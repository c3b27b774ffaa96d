"""Closing or draining in a world in which a rank has died or says nothing: soon, and with its name."""

import logging
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process_world import ProcessWorld, Rank
from thread_world import DEADLINE_S, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.errors import RankTimeoutError

_NEVER = 100 * DEADLINE_S
_SOON = 1.0


def _without_the_last(
    rank: Rank, ranks_per_node: int, timeout_s: float, sends: bool, hidden: int = 64
) -> AllToAll:
    """Return all ranks but the last after a round, with this deadline from now on, and on request a half."""
    size = rank.bootstrap.world_size
    config = AllToAllConfig(hidden, size, size, 64, dtype=torch.float32, combine_dtype=torch.float32)
    all_to_all = AllToAll(config, rank.bootstrap, settings_of(ranks_per_node, timeout_s=_NEVER))
    x, ids, weights = torch.ones(64, hidden), torch.arange(size).repeat(64, 1), torch.ones(64, size)
    dispatched, handle = all_to_all.dispatch(x, ids, weights)
    all_to_all.combine(dispatched.x, handle)
    all_to_all.drain()
    rank.tell("ready")
    if all_to_all.rank == size - 1:
        threading.Event().wait()
    rank.await_go()
    if sends:
        all_to_all.dispatch_send(x, ids, weights)
    generation = all_to_all._generations.current()
    generation._settings = replace(generation._settings, timeout_s=timeout_s)
    return all_to_all


def _close(rank: Rank, ranks_per_node: int, timeout_s: float, sends: bool) -> list[str]:
    """Return what close(), which has this deadline, logs as a warning; all ranks but the last come to it."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm_efa_ep.recovery").addHandler(handler)
    _without_the_last(rank, ranks_per_node, timeout_s, sends).close()
    assert "efa_ep_arena" not in Path("/proc/self/maps").read_text()
    return warnings


def _drain(rank: Rank) -> None:
    """Two megabytes are under way: TCP has no room for them without the peer."""
    all_to_all = _without_the_last(rank, 1, _SOON, sends=True, hidden=8192)
    with pytest.raises(RankTimeoutError, match=r"drain on rank 0 waited [\d.]+ s .* rank 1") as caught:
        all_to_all.drain()
    assert caught.value.missing == (1,)
    with pytest.raises(RankTimeoutError):
        all_to_all.drain()


def _seen_by_the_first_when_the_second_freezes(world: ProcessWorld) -> Any:
    for rank in range(2):
        world.hear(rank, "ready")
    world.signal(1, signal.SIGSTOP)
    world.go(0)
    ended = world.ended(0)
    assert ended.error is None, ended.message
    return ended.value


@pytest.mark.parametrize("sends", [False, True])
@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 1), (2, 2), (4, 2)])
def test_a_dead_rank_is_not_waited_for(size: int, ranks_per_node: int, sends: bool) -> None:
    """Neither for the completion of writes to it, nor for it to close; there is no deadline here."""
    with ProcessWorld(size, _close, ranks_per_node, _NEVER, sends) as world:
        for rank in range(size):
            world.hear(rank, "ready")
        world.signal(size - 1, signal.SIGKILL)
        for rank in range(size - 1):
            world.go(rank)
        for rank in range(size - 1):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
            (warning,) = ended.value
            assert warning.startswith("EFA EP: closed without the others: ")
            assert f"rank {size - 1}" in warning


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_a_frozen_rank_is_waited_for_until_the_deadline(ranks_per_node: int) -> None:
    """And named then."""
    with ProcessWorld(2, _close, ranks_per_node, _SOON, False) as world:
        (warning,) = _seen_by_the_first_when_the_second_freezes(world)
        waited = re.search(r"close on rank 0 waited ([\d.]+) s for rank 1", warning)
        assert waited, warning
        assert float(waited[1]) >= _SOON


def test_drain_names_the_rank_that_takes_no_writes() -> None:
    """And the world has ended for the caller, as after a half that failed."""
    with ProcessWorld(2, _drain) as world:
        _seen_by_the_first_when_the_second_freezes(world)
