"""Which expert weights move where, to rebalance or to give the experts of a lost rank a new host.

Weights live in slots. With ``S`` slots per rank, slot ``s`` of rank ``r`` is entry ``r * S + s`` of a map
that says which logical expert it holds, -1 for none: vLLM's ``physical_to_logical_map`` of one layer.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_efa_ep.errors import ConfigurationError, ExpertTransferError

EMPTY = -1


class Move(NamedTuple):
    """One expert that a rank has to fetch.

    Attributes:
        expert: The logical expert.
        source: The rank that has its weights; may be the fetching rank itself.
        source_slot: Where it has them.
        slot: Where the fetching rank wants them.

    """

    expert: int
    source: int
    source_slot: int
    slot: int


def plan_moves(
    old: Sequence[int], new: Sequence[int], ranks: int, lost: Collection[int] = ()
) -> list[list[Move]]:
    """Plan how every rank gets from the map ``old`` to the map ``new``.

    Every rank that is given the same maps plans the same, so nobody has to tell anybody. A rank that has the
    expert in another slot takes it from there; otherwise the source is the rank that has fewest experts to
    give so far, the lowest of several, so that copies of a popular expert share the load. Slots that keep
    their expert, or end up empty, do not move. Nothing is fetched from a lost rank, nor for one.

    Args:
        old: Expert of every slot now, ``ranks * S`` entries.
        new: Expert of every slot afterwards, of the same length.
        ranks: Number of ranks, lost ones included.
        lost: Ranks whose memory is gone.

    Returns:
        The moves of every rank, in the order of their slots.

    Raises:
        ConfigurationError: The maps do not fit each other or the number of ranks.
        ExpertTransferError: The last copy of an expert is gone; its weights must be loaded from the
            checkpoint.

    """
    slots = _slots_per_rank(old, new, ranks)
    copies: dict[int, dict[int, int]] = {}  # expert -> rank -> its first slot there
    for entry, expert in enumerate(old):
        rank, slot = divmod(entry, slots)
        if expert != EMPTY and rank not in lost:
            copies.setdefault(expert, {}).setdefault(rank, slot)
    given = [0] * ranks
    moves: list[list[Move]] = [[] for _ in range(ranks)]
    for entry, expert in enumerate(new):
        rank, slot = divmod(entry, slots)
        if rank in lost or expert in (EMPTY, old[entry]):
            continue
        hosts = copies.get(expert, {})
        if not hosts:
            raise ExpertTransferError(
                f"no rank that is left has expert {expert}, which slot {slot} of rank {rank} should get; "
                "load its weights from the checkpoint, or keep redundant copies of experts (vLLM's "
                "num_redundant_experts)",
                experts=(expert,),
            )
        source = rank if rank in hosts else min(hosts, key=lambda host: (given[host], host))
        given[source] += source != rank
        moves[rank].append(Move(expert, source, hosts[source], slot))
    return moves


def _slots_per_rank(old: Sequence[int], new: Sequence[int], ranks: int) -> int:
    if ranks < 1 or len(old) != len(new) or len(old) % ranks != 0:
        raise ConfigurationError(
            f"maps of {len(old)} and {len(new)} slots cannot be those of {ranks} ranks; both need the same "
            "number of slots, a multiple of the number of ranks"
        )
    return len(old) // ranks
