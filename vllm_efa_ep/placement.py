"""Tables that say which rank owns which (physical) expert."""

from collections.abc import Sequence


def linear_placement(num_experts: int, world_size: int) -> tuple[int, ...]:
    """Consecutive experts on each rank; the first ranks take one more if the division leaves a rest."""
    share, rest = divmod(num_experts, world_size)
    return tuple(rank for rank in range(world_size) for _ in range(share + (rank < rest)))


def round_robin_placement(num_experts: int, world_size: int) -> tuple[int, ...]:
    """Expert ``e`` on rank ``e % world_size``."""
    return tuple(expert % world_size for expert in range(num_experts))


def experts_of(placement: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return the global ids of a rank's experts; their order is the rank's local numbering."""
    return tuple(expert for expert, owner in enumerate(placement) if owner == rank)
