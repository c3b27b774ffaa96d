"""Worlds whose ranks are threads of the test's process.

The halves release the interpreter lock, so such ranks run side by side like processes do, start in
milliseconds, and can be held and released with events. With ``ranks_per_node`` below the world's size, nodes
talk over a real libfabric provider on the loopback interface.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import EfaEpError

# Of what comes unless something is broken, however little of the machine the test gets.
DEADLINE_S = 180.0
_Result = TypeVar("_Result")


def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    """Wait for a condition; return whether it came true."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


class Rendezvous:
    """What the ranks of one world share: rounds of gathering, and a table of published values."""

    def __init__(self, size: int, deadline_s: float = DEADLINE_S) -> None:
        """Prepare for ``size`` ranks that meet within ``deadline_s``."""
        self.size = size
        self.published: dict[str, str] = {}
        self._deadline_s = deadline_s
        self._gatherings: dict[int, dict[int, bytes]] = {}
        self._changed = threading.Condition()
        self._left = False

    def gather(self, number: int, place: int, payload: bytes) -> list[bytes]:
        """Bring a payload to the gathering with this number and return everybody's."""
        with self._changed:
            gathering = self._gatherings.setdefault(number, {})
            gathering[place] = payload
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._left or len(gathering) == self.size, self._deadline_s)
            if len(gathering) < self.size:
                raise EfaEpError(f"only ranks {sorted(gathering)} came to gathering {number}")
            return [gathering[each] for each in range(self.size)]

    def leave(self) -> None:
        """Let nobody wait for a rank that has ended."""
        with self._changed:
            self._left = True
            self._changed.notify_all()


class Meeting:
    """A point that all ranks of a world have to reach before one goes on."""

    def __init__(self, size: int) -> None:
        """Expect ``size`` ranks."""
        self._barrier = threading.Barrier(size, timeout=DEADLINE_S)

    def wait(self) -> None:
        """Wait for the others."""
        self._barrier.wait()


class ThreadBootstrap:
    """A ``Bootstrap`` over a ``Rendezvous``."""

    def __init__(self, rendezvous: Rendezvous, place: int, claimed_rank: int | None = None) -> None:
        """Take ``place``, and claim to be that rank or ``claimed_rank``."""
        self._rendezvous = rendezvous
        self._place = place
        self._rank = place if claimed_rank is None else claimed_rank
        self._gatherings = 0

    def claiming(self, rank: int) -> "ThreadBootstrap":
        """Return a bootstrap in the same place that claims to be ``rank``."""
        return ThreadBootstrap(self._rendezvous, self._place, rank)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._rendezvous.size

    @property
    def address(self) -> str:
        """All ranks run here."""
        return "127.0.0.1"

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Meet all ranks and return their payloads."""
        self._gatherings += 1
        return self._rendezvous.gather(self._gatherings, self._place, payload)

    def publish(self, key: str, value: str) -> None:
        """Set a value."""
        self._rendezvous.published[key] = value

    def publish_once(self, key: str, value: str) -> str:
        """Set a value unless there is one; a dictionary does it in one step."""
        return self._rendezvous.published.setdefault(key, value)

    def lookup(self, key: str) -> str | None:
        """Get a value, if it is set."""
        return self._rendezvous.published.get(key)


@dataclass
class Outcome(Generic[_Result]):
    """How a rank ended: with a value or with an error."""

    value: _Result | None = None
    error: BaseException | None = None
    ended_at: float = field(default=0.0, repr=False)

    def get(self) -> _Result:
        """Return the value or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def outcomes_of_ranks(
    size: int, body: Callable[[ThreadBootstrap], _Result], deadline_s: float = DEADLINE_S
) -> list[Outcome[_Result]]:
    """Run ``body`` once per rank, each in its thread, and return how each ended.

    A rank that ends breaks the rendezvous for those still waiting in it, so nobody outlives the first failure
    for long. Raises ``AssertionError`` if a rank does not end before the deadline.
    """
    rendezvous = Rendezvous(size, deadline_s)
    outcomes: list[Outcome[_Result]] = [Outcome() for _ in range(size)]

    def run(rank: int) -> None:
        try:
            outcomes[rank].value = body(ThreadBootstrap(rendezvous, rank))
        except BaseException as error:  # handed to the test, whatever it is
            outcomes[rank].error = error
            rendezvous.leave()
        outcomes[rank].ended_at = time.monotonic()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = [thread.name for thread in threads if thread.is_alive()]
    assert not hanging, f"{', '.join(hanging)} did not end within {deadline_s:g} s; others: {outcomes}"
    return outcomes


def run_ranks(
    size: int, body: Callable[[ThreadBootstrap], _Result], deadline_s: float = DEADLINE_S
) -> list[_Result]:
    """Like ``outcomes_of_ranks``, but raise the error of the rank that failed first, and return values."""
    outcomes = outcomes_of_ranks(size, body, deadline_s)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        min(failed, key=lambda outcome: outcome.ended_at).get()
    return [outcome.get() for outcome in outcomes]


def settings_of(ranks_per_node: int = 0, **changes: object) -> Settings:
    """Return settings for a world on this machine, not read from the environment.

    The halves' deadline comes before the test's, since it says who was missing.
    """
    defaults = {"provider": "tcp", "interface": "lo", "timeout_s": DEADLINE_S / 2}
    return Settings(**{"ranks_per_node": ranks_per_node, **defaults, **changes})  # type: ignore[arg-type]


def run_world(
    config: AllToAllConfig,
    size: int,
    settings: Settings,
    body: Callable[[AllToAll], _Result],
    deadline_s: float = DEADLINE_S,
) -> list[_Result]:
    """Build an ``AllToAll`` on each of ``size`` ranks, run ``body`` with it, and close it."""

    def run(bootstrap: ThreadBootstrap) -> _Result:
        with AllToAll(config, bootstrap, settings) as all_to_all:
            return body(all_to_all)

    return run_ranks(size, run, deadline_s)
