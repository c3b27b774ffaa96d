"""How far the clocks of ranks are apart, from messages that all of them exchange anyway.

Let ``d(a, b)`` be the least time, over some messages, from ``a``'s clock at sending to ``b``'s on arrival:
the least transit plus the offset of ``b``'s clock. In ``d(b, a)`` the offset counts the other way. Half the
difference is the offset, and half the sum bounds its error, whatever the transits are (as in NTP, RFC 5905).
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from vllm_efa_ep.bootstrap import Bootstrap

_EXCHANGES = 8


class Offset(NamedTuple):
    """What to subtract from a clock to get the reference's, and how wrong that may be, in nanoseconds."""

    ns: float
    error_ns: float


def least_delays_ns(bootstrap: Bootstrap) -> list[int]:
    """Collective: return, by rank, the least time from its clock when it sent to this rank's on arrival."""
    delays: list[int] = []
    for _ in range(_EXCHANGES):
        told = bootstrap.all_gather(str(time.monotonic_ns()).encode())
        now = time.monotonic_ns()
        seen = [now - int(sent) for sent in told]
        delays = [min(pair) for pair in zip(delays, seen, strict=True)] if delays else seen
    return delays


def offset_between(
    reference: Sequence[int], other: Sequence[int], delays_ns: dict[int, Sequence[int]]
) -> Offset:
    """Return the offset of the clock that the ranks ``other`` share against that of ``reference``.

    Args:
        reference: Ranks of one host.
        other: Ranks of another.
        delays_ns: By rank, what ``least_delays_ns`` returned there.

    """
    pairs = [
        (delays_ns[b][a], delays_ns[a][b])
        for a in reference
        for b in other
        if a in delays_ns and b in delays_ns
    ]
    there, back = min(pairs, key=sum)
    return Offset((there - back) / 2, (there + back) / 2)
