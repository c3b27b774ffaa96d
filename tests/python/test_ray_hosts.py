"""Ranks on Ray whose start or end goes wrong: nobody waits for ever, and no actor stays."""

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_efa_ep.bootstrap import ray_hosts
from vllm_efa_ep.bootstrap.coordinator import digest_of
from vllm_efa_ep.bootstrap.ray_hosts import RayHost, RayRanks, run_on_ray
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.errors import EfaEpError

_RUN = Run.new()
_HERE = RayHost("ab" * 28, "127.0.0.1", 0)


class _Method:
    """A method of an actor; the answer to a call is a name."""

    def __init__(self, actor: str) -> None:
        self._actor = actor

    def remote(self, *_: Any) -> str:
        return f"answer of {self._actor}"


class _Actors:
    """Stands for Ray: starts actors, and remembers which were killed."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.started: list[tuple[dict[str, str], Mapping[str, str]]] = []
        self._names = (f"actor {number}" for number in itertools.count())

    def remote(self, _: type) -> Any:
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=partial(self._start, options))
        )

    def _start(self, options: dict[str, Any], *arguments: Any) -> Any:
        name = next(self._names)
        if arguments:
            self.started.append((options["runtime_env"]["env_vars"], arguments[1]))
        return SimpleNamespace(begin=_Method(name), result=_Method(name), name=name)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.name)

    def get(self, answer: str) -> str:
        return answer


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> _Actors:
    """Actors in the place of Ray's, on one host."""
    ray = _Actors()
    monkeypatch.setattr(ray_hosts, "ray", ray)
    monkeypatch.setattr(ray_hosts, "ray_hosts", lambda: [_HERE])
    return ray


def test_ranks_that_start_late_are_ended(actors: _Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors are detached: whoever does not end them leaves them to the cluster for ever."""
    monkeypatch.setattr(actors, "wait", lambda waiting, **_: (waiting[:1], waiting[1:]), raising=False)
    with pytest.raises(EfaEpError, match=r"did not start ranks \[1, 2\] within 600 s"):
        run_on_ray(3, print)
    assert actors.killed == ["actor 0", "actor 1", "actor 2"]


def test_ranks_whose_start_is_interrupted_are_ended(actors: _Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while they are placed is no Exception."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(actors, "wait", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        RayRanks.start(_RUN, 2, print)
    assert actors.killed == ["actor 0", "actor 1"]


def test_the_deadline_is_that_of_all_ranks_together(actors: _Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result that comes in leaves the others less time, by this clock 4 s."""
    now, left = 0.0, []

    def wait(waiting: Sequence[str], timeout: float) -> tuple[Sequence[str], Sequence[str]]:
        nonlocal now
        left.append(timeout)
        now += 4
        return (waiting[:1], waiting[1:]) if timeout >= 4 else ([], waiting)

    monkeypatch.setattr(actors, "wait", wait, raising=False)
    monkeypatch.setattr(ray_hosts, "time", SimpleNamespace(monotonic=lambda: now))
    ranks = RayRanks(_RUN, [actors.remote(object).options().remote() for _ in range(4)])
    with pytest.raises(EfaEpError, match=r"ranks \[2, 3\] did not end within 10 s"):
        ranks.results(10.0)
    assert left == [10.0, 6.0, 2.0]


def test_a_rank_that_exits_hands_that_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.exit() ends a thread without a word, and the driver would wait."""
    monkeypatch.setattr(ray_hosts, "RayBootstrap", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(ray_hosts, "_KEEP_RESULT_S", 0.0)
    monkeypatch.setattr(ray_hosts, "os", SimpleNamespace(_exit=lambda _: None))
    rank = ray_hosts._Rank(digest_of(_RUN.token), {})

    def leave(_: Any) -> None:
        raise SystemExit(3)

    rank._work(_RUN, 0, 1, 1.0, False, leave, ())
    with pytest.raises(EfaEpError, match="ended by SystemExit: 3"):
        rank.result(_RUN.token)


def test_what_belongs_to_one_host_is_not_forced_on_the_others(
    actors: _Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose interface or library is another one says so where its Ray is started."""
    monkeypatch.setattr(actors, "wait", lambda waiting, **_: (waiting, []), raising=False)
    of_hosts = {"EFA_EP_INTERFACE": "of the driver", "EFA_EP_LIBFABRIC": "of the driver"}
    for name, value in {**of_hosts, "EFA_EP_PROVIDER": "tcp"}.items():
        monkeypatch.setenv(name, value)
    RayRanks.start(_RUN, 1, print, environment={"OF_ALL": "ranks"})
    ((forced, offered),) = actors.started
    assert (forced["EFA_EP_PROVIDER"], forced["OF_ALL"]) == ("tcp", "ranks")
    assert offered == of_hosts
    assert not of_hosts.keys() & forced.keys()

    monkeypatch.setenv("EFA_EP_INTERFACE", "of the host")
    monkeypatch.delenv("EFA_EP_LIBFABRIC")  # and so it is afterwards
    ray_hosts._Rank(digest_of(_RUN.token), offered)
    assert os.environ["EFA_EP_INTERFACE"] == "of the host"
    assert os.environ["EFA_EP_LIBFABRIC"] == "of the driver"
