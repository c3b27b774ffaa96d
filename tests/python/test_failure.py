"""Death and silence of ranks: every other rank gets an error that names the culprit, in time, and lives."""

import resource
import signal
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_world import ProcessWorld, Rank
from thread_world import DEADLINE_S, ThreadBootstrap, outcomes_of_ranks, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, generation
from vllm_efa_ep.errors import EfaEpError, RankTimeoutError

_ROW = 1024  # float32 columns, so that a row is a page
_TOKENS = 8
# Half of it for the live ranks of all worlds to do their part, half for what they tell each other when their
# deadlines pass. The product's shares are for deadlines of minutes: on a busy machine a rank may begin to
# wait a second after another, and would tell it too late that both wait for a third.
_SECONDS, _DIAGNOSIS_SHARE = 8.0, 0.5
_NEVER = 100 * DEADLINE_S  # a deadline for those who must not need one
_HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
_WORLDS_AT_ONCE = 8
# The nap of a waiting half gives the processor up each time; nothing else a half does comes close to this.
_SWITCHES_OF_A_WAIT = 50


@dataclass(frozen=True)
class Case:
    """Which rank falls silent, where, and by which signal."""

    victim: int
    half: str
    inside: bool
    signal: signal.Signals
    round: int  # in the first round connections are not up yet


class Victim:
    """Brings a rank to a point of a round, where it dies or waits for the test's signal."""

    def __init__(self, rank: Rank, half: str, inside: bool) -> None:
        """Fail before or inside ``half``."""
        self._rank = rank
        self._half = half
        self._inside = inside

    def before(self, half: str) -> None:
        """Take note that ``half`` comes now."""
        if half != self._half:
            return
        if not self._inside:
            self._rank.tell("there")
            threading.Event().wait()
        if half.endswith("recv"):
            threading.Thread(
                target=self._tell_when_waiting, args=(threading.get_native_id(),), daemon=True
            ).start()

    def rows(self, half: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the input of a send half: for the half to die in, one whose second part cannot be read."""
        if half != self._half or not self._inside or len(rows) < 2:
            return rows
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(rows.nbytes)
            broken = np.memmap(file.name, dtype=np.float32, shape=tuple(rows.shape), mode="r+")
            broken[:] = rows.numpy()
            file.truncate(rows.nbytes // 2 // resource.getpagesize() * resource.getpagesize())
        return torch.from_numpy(broken)

    def _tell_when_waiting(self, thread: int) -> None:
        status = Path(f"/proc/self/task/{thread}/status")
        start = _voluntary_switches(status)
        while _voluntary_switches(status) < start + _SWITCHES_OF_A_WAIT:
            threading.Event().wait(0.001)
        self._rank.tell("there")


def _voluntary_switches(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("voluntary"))
    return int(line.split()[1])


def _mapped(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def _run_rounds(rank: Rank, all_to_all: AllToAll, case: Case) -> None:
    """Run rounds until one fails; everybody dispatches to everybody."""
    size = all_to_all.world_size
    victim = Victim(rank, case.half, case.inside) if all_to_all.rank == case.victim else None
    # To find the victim waiting inside a receive half, the others must not have sent what it waits for.
    hold_before = case.half.replace("recv", "send") if case.inside and case.half.endswith("recv") else ""
    x = torch.ones(_TOKENS, _ROW)
    ids = torch.arange(size).repeat(_TOKENS, 1)
    weights = torch.ones(_TOKENS, size)
    for number in range(1, case.round + 3):
        script = victim if number == case.round else None

        def reach(half: str, script: Victim | None = script, number: int = number) -> None:
            if script is not None:
                script.before(half)
            elif victim is None and number == case.round and half == hold_before:
                rank.await_go()

        reach("dispatch_send")
        handle = all_to_all.dispatch_send(script.rows("dispatch_send", x) if script else x, ids, weights)
        reach("dispatch_recv")
        got = all_to_all.dispatch_recv(handle)
        reach("combine_send")
        all_to_all.combine_send(script.rows("combine_send", got.x) if script else got.x, handle)
        reach("combine_recv")
        all_to_all.combine_recv(handle)
    raise AssertionError("no round failed")


def _body(rank: Rank, ranks_per_node: int, case: Case) -> dict[str, Any]:
    generation._DIAGNOSIS_SHARE = _DIAGNOSIS_SHARE
    size = rank.bootstrap.world_size
    config = AllToAllConfig(_ROW, size, size, _TOKENS, dtype=torch.float32, combine_dtype=torch.float32)
    # The end of a process is noticed by itself; for a frozen one there is only the deadline.
    timeout_s = _SECONDS if case.signal == signal.SIGSTOP else _NEVER
    settings = settings_of(ranks_per_node, timeout_s=timeout_s, chunk_bytes=1)
    all_to_all = AllToAll(config, rank.bootstrap, settings)
    rank.tell("ready")
    rank.await_go()
    with pytest.raises(EfaEpError) as first:
        _run_rounds(rank, all_to_all, case)
    with pytest.raises(type(first.value)) as again:
        all_to_all.dispatch_send(
            torch.ones(0, _ROW), torch.ones(0, size, dtype=torch.int64), torch.ones(0, size)
        )
    arenas = _mapped("efa_ep_arena")
    all_to_all.close()
    return {
        "error": type(first.value).__name__,
        "message": str(first.value),
        "missing": getattr(first.value, "missing", ()),
        "lost": getattr(first.value, "rank", -1),
        "half": getattr(first.value, "half", ""),
        "round": getattr(first.value, "round", 0),
        "again": str(again.value),
        "arenas": arenas,
        "arenas_after_close": _mapped("efa_ep_arena"),
        "named_memory": _mapped("/dev/shm"),  # what a killed process would leave behind
    }


def _silence(world: ProcessWorld, case: Case) -> None:
    """Let all ranks of a world that is ready run their rounds, and the victim fall silent."""
    ranks = range(len(world.processes))
    for rank in ranks:
        world.go(rank)
    if case.inside and case.half.endswith("send"):
        world.processes[case.victim].join(DEADLINE_S)
        assert world.processes[case.victim].exitcode == -signal.SIGBUS
        return
    world.hear(case.victim, "there")
    world.signal(case.victim, case.signal)
    if case.inside:
        for rank in ranks:
            if rank != case.victim:
                world.go(rank)


def _check_others(world: ProcessWorld, ranks_per_node: int, case: Case) -> None:
    others = [rank for rank in range(len(world.processes)) if rank != case.victim]
    for rank in others:
        ended = world.ended(rank)
        assert ended.error is None, f"rank {rank}: {ended.error}: {ended.message}"
        found = ended.value
        expected = "RankTimeoutError" if case.signal == signal.SIGSTOP else "RankLostError"
        assert found["error"] in (expected, "TransportError"), f"rank {rank}: {found}"
        if found["error"] == "RankLostError":
            assert found["lost"] == case.victim
            assert found["half"] in _HALVES
            # What a dead rank had sent lets others go on to the next round; a late one may be one behind.
            assert abs(found["round"] - case.round) <= 1
            assert f"{found['half']} of round {found['round']} on rank {rank} waited" in found["message"]
        assert f"rank {case.victim}" in found["message"], f"rank {rank}: {found}"
        # Also without the explanation, which a dead store cannot give.
        missing = ", ".join(map(str, found["missing"]))
        named = f"rank{'s' if len(found['missing']) > 1 else ''} {missing}"
        assert named in found["message"] or not missing
        assert found["again"] == found["message"]
        assert found["arenas"] == ranks_per_node
        assert found["arenas_after_close"] == 0
        assert found["named_memory"] == 0
    assert world.exit_codes(others) == [0] * len(others)


def _check(size: int, ranks_per_node: int, cases: list[Case]) -> None:
    """Play the cases, several at a time; their ranks mostly wait."""
    failed = []
    for start in range(0, len(cases), _WORLDS_AT_ONCE):
        batch = cases[start : start + _WORLDS_AT_ONCE]
        with ExitStack() as cleanup:
            worlds = [
                cleanup.enter_context(ProcessWorld(size, _body, ranks_per_node, case)) for case in batch
            ]
            for world in worlds:
                for rank in range(size):
                    world.hear(rank, "ready")
            for world, case in zip(worlds, batch, strict=True):
                _silence(world, case)
            for world, case in zip(worlds, batch, strict=True):
                try:
                    _check_others(world, ranks_per_node, case)
                except AssertionError as error:
                    failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


def _cases(number: signal.Signals, victims: tuple[int, ...]) -> list[Case]:
    return [
        Case(victim, half, inside, number, bad_round)
        for half, inside, victim, bad_round in product(_HALVES, (False, True), victims, (1, 2))
        # What dies inside a send half dies of a page that cannot be read, which does not freeze.
        if number == signal.SIGKILL or not inside or half.endswith("recv")
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 1), (2, 2), (1, 3)])
def test_all_others_name_the_silent_rank(nodes: int, ranks_per_node: int, number: signal.Signals) -> None:
    """A rank dies or freezes before or inside any half; rank 0 hosts the store of torch.distributed."""
    size = nodes * ranks_per_node
    cases = _cases(number, (0, size - 1))
    # One of four for each place in a round, not always the same.
    _check(size, ranks_per_node, [cases[place + place // 4 % 4] for place in range(0, len(cases), 4)])


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 1), (2, 2), (1, 3), (3, 1), (2, 3)])
def test_all_others_name_any_silent_rank(nodes: int, ranks_per_node: int, number: signal.Signals) -> None:
    """The same for every rank, in the first and in a later round."""
    size = nodes * ranks_per_node
    _check(size, ranks_per_node, _cases(number, tuple(range(size))))


def _wait_for_a_silent_rank(rank: Rank) -> dict[str, Any]:
    # What a shell runs in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = AllToAllConfig(_ROW, 2, 2, _TOKENS)
    settings = settings_of(1, timeout_s=10 * DEADLINE_S)
    all_to_all = AllToAll(config, rank.bootstrap, settings)
    if all_to_all.rank == 1:
        threading.Event().wait()
    nothing = torch.ones(0, _ROW).bfloat16(), torch.ones(0, 2, dtype=torch.int64), torch.ones(0, 2)
    handle = all_to_all.dispatch_send(*nothing)
    Victim(rank, "dispatch_recv", inside=True).before("dispatch_recv")
    with pytest.raises(KeyboardInterrupt) as interrupted:
        all_to_all.dispatch_recv(handle)
    with pytest.raises(EfaEpError) as refused:
        all_to_all.dispatch_recv(handle)
    all_to_all.close()
    return {"notes": interrupted.value.__notes__, "refused": str(refused.value)}


def test_a_signal_ends_a_wait_before_its_deadline() -> None:
    """Ctrl-C is not held up by a rank that says nothing, and the instance does not go on after it."""
    with ProcessWorld(2, _wait_for_a_silent_rank) as world:
        world.hear(0, "there")
        world.signal(0, signal.SIGINT)
        ended = world.ended(0)
        assert ended.error is None, ended.message
        (note,) = ended.value["notes"]
        assert note.startswith("dispatch_recv of round 1 on rank 0 waited")
        assert note.endswith("for rank 1")
        assert f"interrupted by KeyboardInterrupt: {note}" == ended.value["refused"]
        assert world.exit_codes([0]) == [0]


def test_a_failure_can_be_asked_for() -> None:
    """Whoever did not call the half that failed still learns of it, and gets its error."""

    def body(bootstrap: ThreadBootstrap) -> None:
        settings = settings_of(2, timeout_s=3.0)
        with AllToAll(AllToAllConfig(64, 4, 2, 4, device="cpu"), bootstrap, settings) as all_to_all:
            assert not all_to_all.fault().item()
            all_to_all.raise_fault()
            if bootstrap.rank == 0:
                with pytest.raises(RankTimeoutError):
                    all_to_all.dispatch(
                        torch.ones(1, 64).bfloat16(), torch.tensor([[0, 3]]), torch.ones(1, 2)
                    )
                assert all_to_all.fault().item()
                with pytest.raises(RankTimeoutError, match="dispatch_recv of round 1"):
                    all_to_all.raise_fault()

    for outcome in outcomes_of_ranks(2, body):
        outcome.get()
