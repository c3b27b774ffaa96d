"""What a check is, and what it finds."""

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_efa_ep.doctor.system import System


class Status(str, enum.Enum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It works, but slower, with less safety, or only for trying."""
    FAILED = "failed"
    """It will not work."""
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Finding:
    """What a check found on one machine.

    Attributes:
        status: How it ended.
        result: What is there, in one sentence.
        facts: Names and values that must be equal on all nodes of a cluster.

    """

    status: Status
    result: str
    facts: Mapping[str, str] = field(default_factory=dict)


def ok(result: str, **facts: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, result, facts)


def warning(result: str, **facts: str) -> Finding:
    """It works, but not as it should."""
    return Finding(Status.WARNING, result, facts)


def failed(result: str, **facts: str) -> Finding:
    """It will not work."""
    return Finding(Status.FAILED, result, facts)


def not_applicable(result: str) -> Finding:
    """There is nothing to check."""
    return Finding(Status.NOT_APPLICABLE, result)


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong.

    Attributes:
        name: Its short name.
        why: Why it matters.
        fix: What to do if it is not ok: a command, or what to change where.
        examine: Looks at a machine.

    """

    name: str
    why: str
    fix: str
    examine: Callable[[System], Finding]


@dataclass(frozen=True)
class Outcome:
    """A check and what it found: what reports are made of, and what nodes send each other as JSON."""

    name: str
    status: Status
    result: str
    why: str
    fix: str
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it for ``json``."""
        return {**asdict(self), "status": self.status.value}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Outcome":
        """Return what ``to_json`` was made of."""
        return cls(**{**found, "status": Status(found["status"])})


def run_check(check: Check, system: System) -> Outcome:
    """Run one check. One that cannot read what it looks at has failed, and says why; it stops no other."""
    try:
        finding = check.examine(system)
    except Exception as error:  # a surprise on a machine that is being diagnosed is a finding, too
        finding = failed(f"could not be checked: {type(error).__name__}: {error}")
    return Outcome(check.name, finding.status, finding.result, check.why, check.fix, finding.facts)


def worst(statuses: Iterable[Status]) -> Status:
    """Return the worst status of some, ``OK`` of none."""
    order = (Status.NOT_APPLICABLE, Status.OK, Status.WARNING, Status.FAILED)
    return max(statuses, key=order.index, default=Status.OK)
