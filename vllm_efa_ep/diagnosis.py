"""Who waits for whom: turns one rank's timeout into the name of the rank that is at fault.

A rank that times out knows only whose signal it lacks, and that rank may be waiting itself. So every failing
rank publishes what it waits for, reads what the others published, and follows the chain to those that say
nothing.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, RankTimeoutError, TransportError
from vllm_efa_ep.messages import integer, read_json

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Report:
    """What a failing rank knows.

    Attributes:
        what: Where it stopped, for people.
        missing: The ranks it waits for.

    """

    what: str
    missing: tuple[int, ...]

    @classmethod
    def of(cls, said: Any, size: int) -> "Report":
        """Interpret what a rank of ``size`` published."""
        what, missing = said
        return cls(str(what), tuple(integer(rank, size) for rank in missing))


def report_of(error: EfaEpError) -> Report | None:
    """Return the report that an error of a half gives rise to, None if no other rank is involved."""
    if isinstance(error, RankTimeoutError):
        return Report(f"{error.half} of round {error.round}", error.missing)
    if isinstance(error, TransportError) and error.peer >= 0:
        return Report("a failed write", (error.peer,))
    return None


def explain(
    bootstrap: Bootstrap,
    error: EfaEpError,
    grace_s: float,
    loss: Callable[[], str],
    called_off: Callable[[], bool] = lambda: False,
    server_of: Sequence[int] | None = None,
) -> str:
    """Publish this rank's report, read the others', and describe the chain.

    Args:
        bootstrap: Carries the reports.
        error: What happened here.
        grace_s: How long to wait for reports of others.
        loss: Says which rank is gone, if one is: that explains everything, and nobody else is asked.
        called_off: Says whether the others have seen enough; then they need not be waited for.
        server_of: As in ``World``: a lost rank's stand-in reports as the rank that serves it. None: all live.

    Returns:
        One sentence to append to the error's message, empty if there is nothing to add.

    """
    report = report_of(error)
    if report is None:
        return ""
    if server_of is not None:
        report = Report(report.what, tuple(sorted({server_of[rank] for rank in report.missing})))
    try:
        bootstrap.publish(_key(bootstrap.rank), json.dumps([report.what, report.missing]))
        reports = _collect(bootstrap, report, grace_s, lambda: bool(loss()) or called_off())
    except ConfigurationError as not_understood:
        return loss() or str(not_understood)
    except EfaEpError as bootstrap_error:
        return loss() or f"Who else waits is unknown: {bootstrap_error}"
    return loss() or describe(bootstrap.rank, reports)


def describe(rank: int, reports: dict[int, Report | None]) -> str:
    """Describe a chain of reports; ``reports`` has None for a rank that said nothing."""
    silent = sorted(other for other, report in reports.items() if report is None)
    waiting = [
        f"rank {other} waits for {_names(report.missing)} in {report.what}"
        for other, report in sorted(reports.items())
        if report is not None and other != rank
    ]
    verdict = (
        f"{_names(tuple(silent))} did not answer: dead, stuck or still computing"
        if silent
        else "all of them answer, so they are late or were started with different work"
    )
    return "; ".join([verdict, *waiting])


def _collect(
    bootstrap: Bootstrap, own: Report, grace_s: float, enough: Callable[[], bool]
) -> dict[int, Report | None]:
    """Read the reports of every rank reachable from ``own`` until all are there or nobody will say more."""
    deadline = time.monotonic() + grace_s
    while True:
        reports: dict[int, Report | None] = {bootstrap.rank: own}
        frontier = [rank for rank in own.missing if rank != bootstrap.rank]
        while frontier:
            rank = frontier.pop()
            if rank in reports:
                continue
            reports[rank] = _lookup(bootstrap, rank)
            found = reports[rank]
            frontier += found.missing if found is not None else ()
        if None not in reports.values() or enough() or time.monotonic() > deadline:
            return reports
        time.sleep(_POLL_SECONDS)


def _lookup(bootstrap: Bootstrap, rank: int) -> Report | None:
    published = bootstrap.lookup(_key(rank))
    if published is None:
        return None
    return read_json(published, f"rank {rank}", lambda said: Report.of(said, bootstrap.world_size))


def _key(rank: int) -> str:
    return f"report/{rank}"


def _names(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
