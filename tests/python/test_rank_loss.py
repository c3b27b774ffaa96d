"""Ranks die; the others agree on a mask and go on, with every row as the oracle says."""

import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_rounds import Script, config_of, play
from process_world import ProcessWorld, Rank
from store_world import StoreWorld
from test_failure import Victim
from thread_world import DEADLINE_S, settings_of, until

from vllm_efa_ep import AllToAll, Handle, generation
from vllm_efa_ep.errors import (
    ConfigurationError,
    RankLostError,
    RankTimeoutError,
    StoreLostError,
    TransportError,
)

_HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
_NEVER_S = 100 * DEADLINE_S  # a deadline for those who must not need one
_SOON_S = 4.0
# A rank whose watch was the lost one's does not know of other losses: whoever lives comes within that time.
_WINDOW_S = 8.0


@dataclass(frozen=True)
class Loss:
    """Who dies where. Ranks in ``recovering`` die while they connect for the next generation."""

    nodes: int
    ranks_per_node: int
    victims: tuple[int, ...]
    half: str = "dispatch_send"
    inside: bool = False
    recovering: tuple[int, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)  # of the configuration

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def waiting(self) -> bool:
        """Whether it dies while it waits for others."""
        return self.inside and self.half.endswith("recv")

    @property
    def survivors(self) -> list[int]:
        """Ranks that live through it."""
        return [rank for rank in range(self.size) if rank not in (*self.victims, *self.recovering)]


class _Hold:
    """Keeps what a victim inside a receive half waits for from being sent."""

    def __init__(self, rank: Rank, half: str) -> None:
        self._rank = rank
        self._half = half

    def before(self, half: str) -> None:
        if half == self._half:
            self._rank.await_go()

    def rows(self, half: str, rows: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return rows


def _mapped_arenas() -> int:
    return Path("/proc/self/maps").read_text().count("efa_ep_arena")


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _body(rank: Rank, loss: Loss) -> dict[str, Any]:
    # Nobody needs a deadline to notice a death, but for one whose connections are being made.
    timeout_s, window_s = (_SOON_S, _SOON_S) if loss.recovering else (_NEVER_S, _WINDOW_S)
    settings = settings_of(loss.ranks_per_node, timeout_s=timeout_s, mask_window_s=window_s, chunk_bytes=600)
    all_to_all = AllToAll(config_of(loss.size, **loss.changes), rank.bootstrap, settings)
    play(all_to_all, 2, seed=0)
    rank.tell("ready")
    own = all_to_all.rank
    script: Script = _Hold(rank, loss.half.replace("recv", "send") if loss.waiting else "")
    if own in loss.victims:
        script = Victim(rank, loss.half, loss.inside)
    with pytest.raises((RankLostError, TransportError)) as lost:
        play(all_to_all, 3, seed=2, script=script)  # what the dead had sent lets others go on
    if own in loss.recovering:
        generation.connect = _die  # type: ignore[assignment]
    live = all_to_all.mask()
    with pytest.raises(ConfigurationError, match="the handle is of generation 0"):
        all_to_all.dispatch_recv(Handle(channel=0, round=1, tokens=1, generation=0))
    dropped = play(all_to_all, 6, seed=100)
    stats = all_to_all.stats()
    assert live == all_to_all.active_ranks()
    assert stats.dropped_slots == dropped
    assert (stats.dropped_weight > 0) == (dropped > 0)
    assert stats.live_ranks == len(live)
    found = {
        "live": live,
        "error": str(lost.value),
        "dropped": dropped,
        "stand_ins": stats.stand_ins,
        "arenas": _mapped_arenas(),
        "rounds": stats.rounds,
    }
    all_to_all.close()
    assert _mapped_arenas() == 0
    return found


def _check(loss: Loss) -> None:
    with StoreWorld(loss.size, _body, loss) as world:
        for rank in range(loss.size):
            world.hear(rank, "ready")
        if not loss.inside or loss.waiting:  # else it dies by itself, of a page that cannot be read
            for victim in loss.victims:
                world.hear(victim, "there")
            for victim in loss.victims:
                world.signal(victim, signal.SIGKILL)
        if loss.waiting:
            for rank in (*loss.survivors, *loss.recovering):
                world.go(rank)
        found = {}
        for rank in loss.survivors:
            ended = world.ended(rank)
            assert ended.error is None, f"rank {rank}: {ended.error}: {ended.message}"
            found[rank] = ended.value
        assert world.exit_codes(loss.survivors) == [0] * len(loss.survivors)
    for rank, value in found.items():
        assert value["live"] == tuple(loss.survivors)
        assert any(f"rank {victim}" in value["error"] for victim in loss.victims), (rank, value)
        positions = 1 + value["stand_ins"]
        assert value["arenas"] == positions * loss.ranks_per_node, f"rank {rank}: {value}"
    assert sum(value["stand_ins"] for value in found.values()) == loss.size - len(loss.survivors)
    assert sum(value["dropped"] for value in found.values()) > 0
    assert len(Counter(value["rounds"] for value in found.values())) <= 2


_PLACES = list(product(_HALVES, (False, True)))


@pytest.mark.parametrize(
    "loss",
    [
        Loss(2, 2, (1,), "dispatch_send"),
        Loss(2, 2, (0,), "dispatch_recv", inside=True),
        Loss(3, 2, (3,), "combine_send", inside=True, changes={"channels": 2}),
        Loss(1, 4, (2,), "combine_recv"),
        Loss(3, 1, (1,), "dispatch_recv", changes={"layout": "per_expert"}),
        Loss(2, 2, (2, 3), "combine_recv"),
        Loss(2, 3, (0, 4, 5), "dispatch_recv", changes={"channels": 2, "layout": "per_expert"}),
        Loss(2, 1, (0,), "combine_send"),
    ],
    ids=str,
)
def test_the_others_go_on(loss: Loss) -> None:
    """Lost rails, lost nodes, the first rank, several at once; in either layout, on either channel."""
    _check(loss)


@pytest.mark.parametrize(
    "loss", [Loss(2, 2, (1,), recovering=(2,)), Loss(3, 1, (0,), recovering=(1,))], ids=str
)
def test_a_loss_while_the_survivors_connect_leads_to_one_more_mask(loss: Loss) -> None:
    """Within the deadline; the mask that failed at its start is history."""
    _check(loss)


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 2), (1, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize(("half", "inside"), _PLACES)
def test_the_others_go_on_wherever_a_rank_dies(
    nodes: int, ranks_per_node: int, half: str, inside: bool
) -> None:
    """Every rank, before and inside every half."""
    for victim in range(nodes * ranks_per_node):
        _check(Loss(nodes, ranks_per_node, (victim,), half, inside, changes={"channels": 1 + victim % 2}))


def _lose_the_store(rank: Rank, frozen: bool) -> str:
    settings = settings_of(1, timeout_s=_SOON_S if frozen else _NEVER_S)
    all_to_all = AllToAll(config_of(3), rank.bootstrap, settings)
    play(all_to_all, 1, seed=0)
    rank.tell("ready")
    if all_to_all.rank == 0:
        threading.Event().wait()
    # The first whose deadline passes calls the other off.
    with pytest.raises((RankTimeoutError, RankLostError) if frozen else RankLostError):
        play(all_to_all, 2, seed=1)
    with pytest.raises(StoreLostError) as failed:
        all_to_all.mask()
    with pytest.raises(StoreLostError) as again:
        play(all_to_all, 1, seed=2)
    assert again.value is failed.value
    all_to_all.close()
    return str(failed.value)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "frozen"])
def test_without_the_store_there_is_an_error_and_no_mask(fault: signal.Signals) -> None:
    """The store that torch puts into rank 0 dies or freezes with it. Nobody waits for it for ever."""
    with ProcessWorld(3, _lose_the_store, fault == signal.SIGSTOP) as world:
        for rank in range(3):
            world.hear(rank, "ready")
        world.signal(0, fault)
        for rank in (1, 2):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
            assert "the store of torch.distributed does not answer" in ended.value
        assert world.exit_codes([1, 2]) == [0, 0]


def _mask_again_and_again(rank: Rank) -> list[tuple[int, int, int]]:
    settings = settings_of(2, timeout_s=_NEVER_S, mask_window_s=_NEVER_S)
    all_to_all = AllToAll(config_of(4), rank.bootstrap, settings)
    found = []
    for number in range(6):
        assert all_to_all.mask() == (0, 1, 2, 3)
        play(all_to_all, 2, seed=10 * number)
        # A question to the store has its answer, its thread not yet its end.
        assert until(lambda: all(thread.name != "efa_ep_store" for thread in threading.enumerate()))
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        found.append((threading.active_count(), descriptors, _mapped_arenas()))
    assert all_to_all.stats().rounds == 12
    all_to_all.close()
    return found


def test_a_generation_leaves_nothing_behind() -> None:
    """Threads, file descriptors and memory are as many after each mask. Nobody need be lost for one."""
    with StoreWorld(4, _mask_again_and_again) as world:
        for rank in range(4):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
            assert len(set(ended.value)) == 1, ended.value
