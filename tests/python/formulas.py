"""The protocol's costs, written from docs/architecture.md and not from the code that incurs them."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from vllm_efa_ep import AllToAllConfig


@dataclass(frozen=True)
class Wire:
    """What one rank writes in one round."""

    writes: int = 0
    bytes: int = 0
    rows: int = 0

    def __add__(self, other: "Wire") -> "Wire":
        """Return the sum."""
        return Wire(self.writes + other.writes, self.bytes + other.bytes, self.rows + other.rows)


def _round_up(value: int) -> int:
    return -(-value // 16) * 16


def row_bytes(config: AllToAllConfig) -> tuple[int, int]:
    """Return the bytes of a dispatch row (token, ids, weights, payload, scales) and of a combine row."""
    head = _round_up(4 + 4 * config.top_k + 4 * config.top_k)
    payload = config.columns * config.dtype.itemsize + 4 * config.scale_columns
    return head + _round_up(payload), config.hidden_size * config.combine_dtype.itemsize


def _pair(rows: int, row_bytes: int, chunk_bytes: int, nics: int) -> Wire:
    """Return what a pair costs: as many chunks as its bytes are nearest to; one per NIC, none empty."""
    if rows == 0:
        return Wire(writes=1)
    nearest = math.floor(Fraction(rows * row_bytes, chunk_bytes) + Fraction(1, 2))
    return Wire(min(rows, max(nearest, nics)), rows * row_bytes, rows)


def wire_of(
    config: AllToAllConfig, ids: list[torch.Tensor], nodes: int, chunk_bytes: int, nics: int, rank: int
) -> Wire:
    """Return what ``rank`` writes in a round in which rank ``r`` routes its tokens by ``ids[r]``."""
    ranks_per_node = len(ids) // nodes
    placement = torch.tensor(config.placement(len(ids)))
    node, index = divmod(rank, ranks_per_node)

    def tokens_to(source: int, target_node: int) -> int:
        target = torch.where(ids[source] >= 0, placement[ids[source].clamp(min=0)] // ranks_per_node, -1)
        return int((target == target_node).any(dim=1).sum())

    dispatch_row, combine_row = row_bytes(config)
    total = Wire()
    for other in range(nodes):
        if other != node:
            total += _pair(tokens_to(rank, other), dispatch_row, chunk_bytes, nics)
            total += _pair(tokens_to(other * ranks_per_node + index, node), combine_row, chunk_bytes, nics)
    return total


def arena_sections(config: AllToAllConfig, size: int, ranks_per_node: int) -> dict[str, int]:
    """Return the bytes of each section of one channel, in whole pages."""
    nodes, max_tokens = size // ranks_per_node, config.max_tokens_per_rank
    dispatch_row, combine_row = row_bytes(config)
    remote = (nodes - 1) * max_tokens
    blocks = nodes * (ranks_per_node - 1) + 1
    sections = {
        "arrivals": 2 * nodes * 64,
        "completions": 2 * 64,
        "dispatch_flags": blocks * 64,
        "result_flags": blocks * 64,
        "row_lists": size * max_tokens * 4,
        "dispatch_staging": nodes * max_tokens * dispatch_row,
        "dispatch_slots": remote * dispatch_row,
        "results": size * max_tokens * combine_row,
        "combine_staging": remote * combine_row if ranks_per_node > 1 else 0,
        "combine_slots": remote * combine_row,
    }
    return {name: -(-size // 4096) * 4096 for name, size in sections.items()}
