"""Who notices the end of a rank, and who must not see one where there is none."""

import itertools
import logging
import os
import signal
import socket
import threading
import weakref

import pytest
import torch
from process_world import ProcessWorld, Rank
from thread_world import DEADLINE_S, ThreadBootstrap, outcomes_of_ranks, run_ranks, settings_of, until

from vllm_efa_ep import AllToAll, AllToAllConfig, watch
from vllm_efa_ep import world as world_module
from vllm_efa_ep.bootstrap.store import address_towards
from vllm_efa_ep.errors import ConfigurationError, RankLostError
from vllm_efa_ep.watch import Watch, start_watch
from vllm_efa_ep.world import join_world

_SHAPES = ("aa", "ab", "aaabbbccc", "abcdef", "abab", "aabc")


def _place_on(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rank ``r`` run on the host with the name ``hosts[r]``."""
    names = {f"rank {rank}": host for rank, host in enumerate(hosts)}
    monkeypatch.setattr(world_module, "host_identity", lambda: names[threading.current_thread().name])


def _start(bootstrap: ThreadBootstrap, timeout_s: float = DEADLINE_S) -> Watch:
    return start_watch(join_world(bootstrap, {}, 1), bootstrap, timeout_s)


@pytest.mark.parametrize("hosts", _SHAPES)
def test_everybody_notices_any_rank_that_ends(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours by themselves, the others from them; the ends that follow change nothing."""
    _place_on(hosts, monkeypatch)
    for victim in range(len(hosts)):
        watches = run_ranks(len(hosts), _start)
        others = [each for rank, each in enumerate(watches) if rank != victim]
        for each in others:
            each.check("dispatch_recv", 1, "a wait")
        watches[victim].close()
        assert until(lambda others=others: all(each.lost is not None for each in others))  # type: ignore[misc]
        for each in others:
            each.close()
            assert each.lost == victim
            with pytest.raises(RankLostError, match=f"a wait, but rank {victim} is gone") as caught:
                each.check("dispatch_recv", 7, "a wait")
            assert (caught.value.half, caught.value.round, caught.value.rank) == ("dispatch_recv", 7, victim)


@pytest.mark.parametrize("hosts", _SHAPES)
def test_leaving_in_order_is_no_loss(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves first."""
    _place_on(hosts, monkeypatch)
    heard = Watch._hear
    ends = set()

    def hear(self: Watch, neighbour: int) -> bool:
        more = heard(self, neighbour)
        if not more:
            ends.add((self._rank, neighbour))
        return more

    monkeypatch.setattr(Watch, "_hear", hear)
    for first in range(len(hosts)):
        watches = run_ranks(len(hosts), _start)
        ends.clear()
        watches[first].leave()
        watches[first].close()
        expected = {(neighbour, first) for neighbour in watches[first]._neighbours}
        assert until(lambda expected=expected: ends == expected)  # type: ignore[misc]
        for each in watches:
            assert each.lost is None
            each.leave()
            each.close()


class _Waits:
    """Of something that cannot ask the watch."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def end(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("called_off", [False, True])
def test_who_cannot_ask_is_told(called_off: bool) -> None:
    """That nobody will answer, also if it was known before; not after the watch, and not kept alive by it."""
    watches = run_ranks(4, _start)
    early, late, dropped, closed = _Waits(), _Waits(), _Waits(), _Waits()
    watches[0].end_waits_by(early.end)
    watches[1].end_waits_by(dropped.end)
    kept_alive = weakref.ref(dropped)
    del dropped
    assert kept_alive() is None
    watches[2].end_waits_by(closed.end)
    watches[2].leave()
    watches[2].close()
    assert not early.ended.is_set()
    if called_off:
        watches[3].call_off()
    watches[3].close()
    assert early.ended.wait(DEADLINE_S)
    assert until(lambda: watches[1].loss("dispatch_recv", 1, "a wait") is not None)
    watches[1].end_waits_by(late.end)
    assert late.ended.is_set()
    for each in watches[:2]:
        each.leave()
    for each in watches[:2]:
        each.close()
    assert not closed.ended.is_set()


def test_one_tree_with_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ranks of the hosts carry the load, and none of it grows with the square of the world."""
    hosts = "aaaabbbbccccdddd"
    _place_on(hosts, monkeypatch)
    watches = run_ranks(len(hosts), _start)
    neighbours = [sorted(each._neighbours) for each in watches]
    assert neighbours[0] == [1, 2, 3, 4, 8, 12]
    for leader, member in itertools.product((4, 8, 12), (1, 2, 3)):
        assert neighbours[leader] == [0, leader + 1, leader + 2, leader + 3]
        assert neighbours[leader + member] == [leader]
    for each in watches:
        each.leave()
    for each in watches:
        each.close()


def test_the_root_has_an_address_that_other_hosts_can_use() -> None:
    """The host of the store may know itself as localhost."""
    found = {0: "127.0.0.1", 8: "10.0.0.2", 16: "10.0.0.3"}
    listeners = {rank: watch._Listener(address, 1, "") for rank, address in found.items()}
    assert watch._root(listeners) == 8
    assert watch._root({0: listeners[0]}) == 0
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigurationError, match="way to no-such-host"):
        address_towards("no-such-host.invalid")


def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever finds the port, and says nothing, too little, or the wrong word, is not a rank."""
    listen_at = watch._listen_at
    silent: list[socket.socket] = []

    def listen_to_strangers_first(address: str) -> socket.socket:
        server = listen_at(address)
        for hello in (b"", b"x", bytes(watch._HELLO.size)):
            with socket.create_connection(server.getsockname()) as stranger:
                stranger.sendall(hello)
        silent.append(socket.create_connection(server.getsockname()))
        return server

    monkeypatch.setattr(watch, "_listen_at", listen_to_strangers_first)
    for each in run_ranks(3, _start):
        each.leave()
    refused = [record.message for record in caplog.records if "refused 127.0.0.1 port" in record.message]
    assert sum("it is not one of the ranks that this rank watches" in each for each in refused) == 3
    for each in silent:
        each.close()


def test_ranks_that_do_not_reach_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one side with the address that was tried, on the other with the deadline."""

    def refuse(*_: object) -> socket.socket:
        raise ConnectionRefusedError("connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    outcomes = outcomes_of_ranks(2, lambda bootstrap: _start(bootstrap, 0.2))
    for outcome, message in zip(
        outcomes,
        ("ranks [1] did not connect within 0.2 s", "rank 0 cannot be reached at 127.0.0.1"),
        strict=True,
    ):
        assert isinstance(outcome.error, ConfigurationError)
        assert message in str(outcome.error)


def test_a_child_process_does_not_hide_the_end_of_its_parent() -> None:
    """It inherits the connections, but must not keep them open."""
    watches = run_ranks(2, _start)
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        watches[1].close()
        assert until(lambda: watches[0].lost == 1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    watches[0].close()


def _on_a_host_of_its_own(rank: Rank) -> tuple[str, str]:
    world_module.host_identity = lambda: f"host {rank.bootstrap.rank}"  # type: ignore[assignment]
    config = AllToAllConfig(16, 3, 1, 1)
    all_to_all = AllToAll(config, rank.bootstrap, settings_of(timeout_s=100 * DEADLINE_S))
    rank.tell("ready")
    if all_to_all.rank == 2:
        threading.Event().wait()
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    with pytest.raises(RankLostError) as caught:
        all_to_all.dispatch(torch.ones(1, 16).bfloat16(), ids, weights)
    all_to_all.close()
    return rank.bootstrap.address, str(caught.value)


def test_hosts_meet_at_the_address_that_leads_to_the_store() -> None:
    """Rank 2 is killed; the others hear of it over the connections between hosts."""
    with ProcessWorld(3, _on_a_host_of_its_own) as world:
        for rank in range(3):
            world.hear(rank, "ready")
        world.signal(2, signal.SIGKILL)
        for rank in range(2):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
            address, message = ended.value
            assert address == "127.0.0.1"
            assert message.endswith("but rank 2 is gone: its process has ended or failed")


def test_the_end_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Also by a rank that waits for nobody, in case somebody ends its process, too."""
    watches = run_ranks(2, _start)
    with caplog.at_level(logging.ERROR, "vllm_efa_ep"):
        watches[1].close()
        assert until(lambda: watches[0].lost == 1)
        watches[0].close()
    (record,) = caplog.records
    assert record.message == "EFA EP: rank 0 sees that rank 1 is gone: its process has ended or failed"
