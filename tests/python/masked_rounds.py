"""Rounds of a world that may have lost ranks, against the oracle.

The oracle is that of any round. Lost ranks dispatch nothing, and slots that name their experts are -1. All
values are small numbers whose sums are exact, so a result is right or wrong.
"""

from typing import Protocol

import torch
from oracle import Batch, check_combined, check_dispatched, compute_experts

from vllm_efa_ep import AllToAll, AllToAllConfig

HIDDEN = 64
TOKENS = 12
EXPERTS_PER_RANK = 2


class Script(Protocol):
    """What a test does between the halves of a round."""

    def before(self, half: str) -> None:
        """Take note that ``half`` comes now."""

    def rows(self, half: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what a send half reads."""


class _NoScript:
    def before(self, half: str) -> None:
        pass

    def rows(self, half: str, rows: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return rows


_NO_SCRIPT = _NoScript()


def config_of(size: int, **changes: object) -> AllToAllConfig:
    """Return the configuration of a world of ``size`` ranks."""
    defaults = {
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS_PER_RANK * size,
        "top_k": 4,
        "max_tokens_per_rank": TOKENS,
        "dtype": torch.float32,
        "combine_dtype": torch.float32,
    }
    return AllToAllConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def play(all_to_all: AllToAll, rounds: int, seed: int, script: Script = _NO_SCRIPT) -> int:
    """Play rounds on all channels in turn and check them; return how many slots this rank had to drop."""
    channels = all_to_all.config.channels
    return sum(play_round(all_to_all, seed + number, number % channels, script) for number in range(rounds))


def play_round(all_to_all: AllToAll, seed: int, channel: int = 0, script: Script = _NO_SCRIPT) -> int:
    """Play one round and check it; return how many slots this rank had to drop."""
    config, size, live = all_to_all.config, all_to_all.world_size, all_to_all.active_ranks()
    sent = [_batch(config, rank, seed, rank in live) for rank in range(size)]
    owners = torch.tensor(config.placement(size))
    lost = torch.tensor([rank not in live for rank in range(size)])
    expected = [_without(batch, owners, lost) for batch in sent]
    own, masked = sent[all_to_all.rank], expected[all_to_all.rank]
    script.before("dispatch_send")
    x = script.rows("dispatch_send", own.x)
    handle = all_to_all.dispatch_send(x, own.topk_ids, own.topk_weights, channel=channel)
    script.before("dispatch_recv")
    got = all_to_all.dispatch_recv(handle)
    check_dispatched(config, expected, all_to_all.local_experts, got)
    per_expert = config.layout == "per_expert"
    output = compute_experts(config, all_to_all.local_experts, got, per_expert, weighted=not per_expert)
    script.before("combine_send")
    all_to_all.combine_send(script.rows("combine_send", output), handle)
    script.before("combine_recv")
    check_combined(config, masked, True, True, all_to_all.combine_recv(handle))
    return int((own.topk_ids != masked.topk_ids).sum())


def _batch(config: AllToAllConfig, rank: int, seed: int, live: bool) -> Batch:
    random = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = int(torch.randint(TOKENS // 2, TOKENS + 1, (), generator=random)) if live else 0
    return Batch(
        torch.randint(-2, 3, (tokens, HIDDEN), generator=random).to(config.dtype),
        torch.randint(-1, config.num_experts, (tokens, config.top_k), generator=random),
        0.5 * torch.randint(1, 4, (tokens, config.top_k), generator=random),
        None,
    )


def _without(batch: Batch, owners: torch.Tensor, lost: torch.Tensor) -> Batch:
    ids = batch.topk_ids
    dropped = (ids >= 0) & lost[owners[ids.clamp(min=0)]]
    return Batch(batch.x, ids.masked_fill(dropped, -1), batch.topk_weights, batch.scales)
