"""A round in flight."""

from typing import NamedTuple


class Handle(NamedTuple):
    """A round in flight: returned by ``dispatch_send``, taken by the other halves.

    Attributes:
        channel: The channel it runs on.
        round: Its number on that channel, from 1 in each generation.
        tokens: Tokens this rank dispatched; T below.
        generation: The generation it belongs to; a round does not outlive it.

    """

    channel: int
    round: int
    tokens: int
    generation: int
