"""Chains of waiting lead to the rank that says nothing."""

import pytest
from thread_world import DEADLINE_S, Meeting, Rendezvous, ThreadBootstrap, run_ranks

from vllm_efa_ep import diagnosis
from vllm_efa_ep.diagnosis import Report, describe, explain, report_of
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, ProtocolError, RankTimeoutError, TransportError


def _nobody_is_gone() -> str:
    return ""


def _timeout(*missing: int) -> RankTimeoutError:
    return RankTimeoutError("waited too long", "dispatch_recv", 7, missing)


def test_a_chain_ends_at_the_silent_rank() -> None:
    """0 waits for 1, 1 for 2, 2 for 3; 3 is dead: all three name it."""
    reported = Meeting(3)

    def body(bootstrap: ThreadBootstrap) -> str:
        if bootstrap.rank == 3:
            return ""
        error = _timeout(bootstrap.rank + 1)
        explain(bootstrap, error, 0.0, _nobody_is_gone)
        reported.wait()
        return explain(bootstrap, error, 0.0, _nobody_is_gone)

    texts = run_ranks(4, body)
    for text in texts[:3]:
        assert text.startswith("rank 3 did not answer")
    assert "rank 1 waits for rank 2 in dispatch_recv of round 7" in texts[0]
    assert "rank 2 waits for rank 3 in dispatch_recv of round 7" in texts[0]


class _Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


def test_reports_that_come_late_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to fail waits, within its grace, for those that fail after it."""
    monkeypatch.setattr(diagnosis, "time", _Clock())
    rendezvous = Rendezvous(3)
    first, second = ThreadBootstrap(rendezvous, 0), ThreadBootstrap(rendezvous, 1)
    lookup = rendezvous.published.get

    class LateTable(dict[str, str]):
        """Has the second rank's report from the third question on."""

        questions = 0

        def get(self, key: str, default: str | None = None) -> str | None:  # type: ignore[override]
            """Answer, or let the second rank fail first."""
            self.questions += 1
            if self.questions == 3:
                rendezvous.published = {**self}
                explain(second, _timeout(2), 0.0, _nobody_is_gone)
            return lookup(key, default)

    rendezvous.published = LateTable()
    text = explain(first, _timeout(1), 0.5, _nobody_is_gone)
    assert text.startswith("rank 2 did not answer")
    assert "rank 1 waits for rank 2" in text


def test_several_silent_ranks_are_all_named() -> None:
    """A rank that waits for many names those of them that say nothing."""
    rendezvous = Rendezvous(6)
    explain(ThreadBootstrap(rendezvous, 2), _timeout(5), 0.0, _nobody_is_gone)
    text = explain(ThreadBootstrap(rendezvous, 0), _timeout(1, 2, 4), 0.0, _nobody_is_gone)
    assert text.startswith("ranks 1, 4, 5 did not answer")


def test_a_cycle_of_waiting_ranks_ends() -> None:
    """Ranks that wait for each other are alive: they were started with different work."""

    def body(bootstrap: ThreadBootstrap) -> str:
        return explain(bootstrap, _timeout((bootstrap.rank + 1) % 3), DEADLINE_S, _nobody_is_gone)

    for text in run_ranks(3, body):
        assert text.startswith("all of them answer")


def test_a_failed_write_blames_its_target() -> None:
    """The peer of a transport error is what the rank waits for."""
    rendezvous = Rendezvous(3)
    explain(ThreadBootstrap(rendezvous, 1), TransportError("connection reset", 2), 0.0, _nobody_is_gone)
    text = explain(ThreadBootstrap(rendezvous, 0), _timeout(1), 0.0, _nobody_is_gone)
    assert text.startswith("rank 2 did not answer")
    assert "rank 1 waits for rank 2 in a failed write" in text


@pytest.mark.parametrize(
    "error", [TransportError("no peer known"), ProtocolError("a stranger"), ConfigurationError("a typo")]
)
def test_errors_without_another_rank_need_no_explanation(error: EfaEpError) -> None:
    """Nothing is published for them."""
    rendezvous = Rendezvous(2)
    assert report_of(error) is None
    assert explain(ThreadBootstrap(rendezvous, 0), error, 10.0, _nobody_is_gone) == ""
    assert rendezvous.published == {}


def test_a_dead_bootstrap_is_said() -> None:
    """The error is explained as far as possible."""

    class Dead(ThreadBootstrap):
        """Its host is gone."""

        def publish(self, key: str, value: str) -> None:
            """Fail."""
            raise EfaEpError(f"the store does not take {key}={value}")

    text = explain(Dead(Rendezvous(2), 1), _timeout(0), 10.0, _nobody_is_gone)
    assert text.startswith("Who else waits is unknown: the store does not take")


def test_a_loss_is_the_whole_explanation() -> None:
    """It ends the search at once, also if the store is gone with that rank, which need not be the peer."""

    class Dead(ThreadBootstrap):
        """Its host is gone."""

        def lookup(self, key: str) -> str | None:
            """Fail."""
            raise EfaEpError(f"the store does not answer about {key}")

    for bootstrap in (ThreadBootstrap(Rendezvous(3), 0), Dead(Rendezvous(3), 0)):
        text = explain(bootstrap, TransportError("connection reset", 1), 1e9, lambda: "rank 2 is gone")
        assert text == "rank 2 is gone"


def test_the_description_leaves_out_the_rank_itself() -> None:
    """It is appended to that rank's own error."""
    text = describe(0, {0: Report("dispatch_recv of round 1", (1,)), 1: None})
    assert text == "rank 1 did not answer: dead, stuck or still computing"
