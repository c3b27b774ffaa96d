"""Ranks that come back: a thawed process whose writes are late, and a new process in a lost one's place."""

import signal
import threading
from typing import Any

import pytest
from masked_rounds import config_of, play, play_round
from process_world import Rank
from store_world import StoreWorld
from thread_world import settings_of

from vllm_efa_ep import AllToAll
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    RankExcludedError,
    RankLostError,
    RankTimeoutError,
)

_SECONDS = 6.0
_WINDOW_S = 3.0
_ROUNDS_AFTER = 6


def _start(rank: Rank, ranks_per_node: int, returning: bool = False) -> AllToAll:
    settings = settings_of(ranks_per_node, timeout_s=_SECONDS, mask_window_s=_WINDOW_S, chunk_bytes=600)
    config = config_of(rank.bootstrap.world_size, channels=2)
    return AllToAll(config, rank.bootstrap, settings, returning)


def _play_until_an_error(all_to_all: AllToAll) -> EfaEpError:
    with pytest.raises((RankLostError, RankTimeoutError)) as failed:
        play(all_to_all, 3, seed=0)
    return failed.value


def _play_until_all_are_back(all_to_all: AllToAll) -> int:
    """Play rounds, with a question whether somebody waits after each; return their number."""
    rounds = 0
    while len(all_to_all.rejoin()) < all_to_all.world_size:
        play_round(all_to_all, 1000 + rounds, rounds % 2)
        rounds += 1
    return rounds


def _end(all_to_all: AllToAll, **found: Any) -> dict[str, Any]:
    """Play some rounds of the whole world, and report."""
    for number in range(_ROUNDS_AFTER):
        assert play_round(all_to_all, 5000 + number, number % 2) == 0
    stats = all_to_all.stats()
    found |= {"incarnation": all_to_all.incarnation, "generation": stats.generation, "live": stats.live_ranks}
    assert stats.stand_ins == 0
    all_to_all.close()
    return found


def _freeze(rank: Rank, ranks_per_node: int, victim: int) -> dict[str, Any]:
    all_to_all = _start(rank, ranks_per_node)
    play_round(all_to_all, 0)
    rank.tell("ready")
    rank.await_go()
    error = _play_until_an_error(all_to_all)
    if all_to_all.rank == victim:
        with pytest.raises(RankExcludedError, match=r"call rejoin\(\)") as excluded:
            all_to_all.mask()
        with pytest.raises(RankExcludedError):
            all_to_all.active_ranks()
        assert excluded.value.generation == 1
        assert len(all_to_all.rejoin()) == all_to_all.world_size
        return _end(all_to_all, error=str(error))
    assert victim not in all_to_all.mask()
    rank.tell("masked")
    rounds = _play_until_all_are_back(all_to_all)
    return _end(all_to_all, error=str(error), rounds=rounds)


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "victim"),
    [
        (4, 2, 1),
        (2, 1, 1),
        pytest.param(3, 3, 0, marks=pytest.mark.long),
        pytest.param(6, 2, 3, marks=pytest.mark.long),
        pytest.param(4, 4, 2, marks=pytest.mark.long),
        pytest.param(3, 1, 0, marks=pytest.mark.long),
    ],
)
def test_a_thawed_rank_harms_nobody_and_comes_back(size: int, ranks_per_node: int, victim: int) -> None:
    """It wakes while the others play rounds, and goes on where it was: writes, flags and lists come too late.

    Every row of every round is checked, on every rank, until and after it is back.
    """
    with StoreWorld(size, _freeze, ranks_per_node, victim) as world:
        for rank in range(size):
            world.hear(rank, "ready")
        world.signal(victim, signal.SIGSTOP)
        for rank in range(size):
            world.go(rank)
        for rank in range(size):
            if rank != victim:
                world.hear(rank, "masked")
        world.signal(victim, signal.SIGCONT)
        errors = []
        for rank in range(size):
            ended = world.ended(rank)
            assert ended.error is None, f"rank {rank}: {ended.error}: {ended.message}"
            found = ended.value
            assert (found["generation"], found["live"]) == (2, size)
            assert found["incarnation"] == (1 if rank == victim else 0)
            if rank != victim:
                errors.append(found["error"])
                # The first whose deadline passes calls the others off, who may not have heard yet of whom.
                assert f"rank {victim}" in errors[-1] or "another rank has given up" in errors[-1]
                assert found["rounds"] > 0
        assert any(f"rank {victim}" in error for error in errors)
        assert world.exit_codes(list(range(size))) == [0] * size


def _lose(rank: Rank, ranks_per_node: int, victims: tuple[int, ...]) -> dict[str, Any]:
    all_to_all = _start(rank, ranks_per_node)
    play_round(all_to_all, 0)
    rank.tell("ready")
    if all_to_all.rank in victims:
        threading.Event().wait()
    _play_until_an_error(all_to_all)
    all_to_all.mask()
    rank.tell("masked")
    return _end(all_to_all, rounds=_play_until_all_are_back(all_to_all))


def _return(rank: Rank, ranks_per_node: int) -> dict[str, Any]:
    all_to_all = _start(rank, ranks_per_node, returning=True)
    _play_until_all_are_back(all_to_all)
    return _end(all_to_all)


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "victims"),
    [(4, 2, (2,)), (3, 1, (0,)), pytest.param(6, 2, (2, 3), marks=pytest.mark.long)],
)
def test_a_new_process_takes_the_place_of_a_lost_one(
    size: int, ranks_per_node: int, victims: tuple[int, ...]
) -> None:
    """It needs the store, the run and its rank; the others let it in between two rounds."""
    with StoreWorld(size, _lose, ranks_per_node, victims) as world:
        for rank in range(size):
            world.hear(rank, "ready")
        for victim in victims:
            world.signal(victim, signal.SIGKILL)
        for rank in range(size):
            if rank not in victims:
                world.hear(rank, "masked")
        for victim in victims:
            world.replace(victim, _return, ranks_per_node)
        for rank in range(size):
            ended = world.ended(rank)
            assert ended.error is None, f"rank {rank}: {ended.error}: {ended.message}"
            assert ended.value["live"] == size
            assert ended.value["incarnation"] == (1 if rank in victims else 0)
        assert world.exit_codes(list(range(size))) == [0] * size


def _refuse(rank: Rank) -> str:
    if rank.bootstrap.rank == 1:
        with pytest.raises(RankTimeoutError, match=r"must call rejoin\(\)") as failed:
            _start(rank, 1, returning=True)
        return str(failed.value)
    all_to_all = AllToAll(
        config_of(1), StoreBootstrap(rank.bootstrap._store, Run.new(), 0, 1), settings_of(1)
    )
    assert all_to_all.rejoin() == (0,)
    play_round(all_to_all, 0)
    all_to_all.close()
    with pytest.raises(ConfigurationError, match="closed"):
        all_to_all.mask()
    return ""


def test_a_rank_that_nobody_lets_in_says_so() -> None:
    """And a world of one rank, closed, has no mask."""
    with StoreWorld(2, _refuse) as world:
        for rank in range(2):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
