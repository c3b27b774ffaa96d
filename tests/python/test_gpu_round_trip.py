"""The order in which ``benchmarks.gpu_round_trip`` gives its GPU work and events, without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_round_trip


class Event:
    """Stands for a CUDA event, and counts microseconds in work before it."""

    log: list[str]

    def __init__(self, **_: object) -> None:
        """Not recorded yet."""

    def record(self) -> None:
        """Take the place in the stream."""
        self.place = len(self.log)
        self.log.append("event")

    def elapsed_time(self, later: "Event") -> float:
        """Return the operations in between, as milliseconds."""
        return sum(each != "event" for each in self.log[self.place : later.place])


def test_a_timed_round_starts_where_another_round_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier's skew, between hosts, is taken up by a round that nobody times."""
    log: list[str] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    monkeypatch.setattr(gpu_round_trip, "_WARM_UP", 0)

    def dispatch(*_: object) -> Any:
        log.append("dispatch")
        return SimpleNamespace(topk_ids=None), None

    bench = object.__new__(gpu_round_trip.Bench)
    bench.x = bench.ids = bench.weights = bench.scales = bench.outputs = torch.zeros(1)
    bench.all_to_all = SimpleNamespace(dispatch=dispatch, combine=lambda *_: log.append("combine"))  # type: ignore[assignment]
    times = gpu_round_trip.measure(bench, iterations=2)
    timed = ["event", "dispatch", "event", "event", "combine", "event"]
    assert log == ["barrier", "dispatch", "combine", *timed] * 2
    assert times == {"dispatch": [1000] * 2, "combine": [1000] * 2, "interval": [2000] * 2}
