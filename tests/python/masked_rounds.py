"""Rounds of a world that may have lost ranks, against the oracle.

The oracle is that of any round. Lost ranks dispatch nothing, and slots that name their experts are -1.
"""

import torch
from oracle import Batch, check_combined, check_dispatched, compute_experts

from vllm_efa_ep import AllToAll, AllToAllConfig

HIDDEN = 64
TOKENS = 12
EXPERTS_PER_RANK = 2


def config_of(size: int, **changes: object) -> AllToAllConfig:
    """Return the configuration of a world of ``size`` ranks."""
    defaults = {"hidden_size": HIDDEN, "num_experts": EXPERTS_PER_RANK * size, "top_k": 4}
    return AllToAllConfig(**{**defaults, "max_tokens_per_rank": TOKENS, **changes})  # type: ignore[arg-type]


def play(all_to_all: AllToAll, rounds: int, seed: int) -> int:
    """Play rounds on all channels in turn and check them; return how many slots this rank had to drop."""
    dropped = 0
    for number in range(rounds):
        dropped += play_round(all_to_all, seed + number, number % all_to_all.config.channels)
    return dropped


def play_round(all_to_all: AllToAll, seed: int, channel: int = 0) -> int:
    """Play one round and check it; return how many slots this rank had to drop."""
    config, size, live = all_to_all.config, all_to_all.world_size, all_to_all.active_ranks()
    sent = [_batch(config, rank, seed, rank in live) for rank in range(size)]
    owners = torch.tensor(config.placement(size))
    lost = torch.tensor([rank not in live for rank in range(size)])
    batches = [_without(batch, owners, lost) for batch in sent]
    own = sent[all_to_all.rank]
    got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights, channel=channel)
    check_dispatched(config, batches, all_to_all.local_experts, got)
    per_expert = config.layout == "per_expert"
    output = compute_experts(config, all_to_all.local_experts, got, per_expert, weighted=not per_expert)
    out = all_to_all.combine(output, handle)
    masked = batches[all_to_all.rank]
    check_combined(config, masked, weighted=True, exact=False, got=out)
    return int((own.topk_ids != masked.topk_ids).sum())


def _batch(config: AllToAllConfig, rank: int, seed: int, live: bool) -> Batch:
    random = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = int(torch.randint(0, TOKENS + 1, (), generator=random)) if live else 0
    return Batch(
        torch.randn(tokens, HIDDEN, generator=random).to(config.dtype),
        torch.randint(-1, config.num_experts, (tokens, config.top_k), generator=random),
        torch.rand(tokens, config.top_k, generator=random),
        None,
    )


def _without(batch: Batch, owners: torch.Tensor, lost: torch.Tensor) -> Batch:
    ids = batch.topk_ids
    named = ids >= 0
    dropped = named & lost[owners[ids.clamp(min=0)]]
    return Batch(batch.x, ids.masked_fill(dropped, -1), batch.topk_weights, batch.scales)
