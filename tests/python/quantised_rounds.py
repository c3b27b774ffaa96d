"""Rounds whose tokens are quantised on their way, and counted where they lie, against torch's own float8."""

from dataclasses import dataclass

import torch

from vllm_efa_ep import AllToAll, AllToAllConfig

_HIDDEN, _EXPERTS, _TOP_K, _TOKENS, _GROUP = 384, 6, 2, 7, 128


def config_of(quantisation: str, device: str) -> AllToAllConfig:
    """Return a small configuration, per_token."""
    return AllToAllConfig(
        *(_HIDDEN, _EXPERTS, _TOP_K, _TOKENS, torch.float8_e4m3fn, torch.float32),
        quantisation=quantisation,  # type: ignore[arg-type]
        device=device,
    )


@dataclass
class _Batch:
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor


def _batch(rank: int, seed: int) -> _Batch:
    """Draw room for all tokens; those beyond the count name experts, too, but must not be sent."""
    random = torch.Generator().manual_seed(1000 * seed + rank)
    exponents = torch.randint(-12, 9, (_TOKENS, _HIDDEN), generator=random)
    x = torch.randn(_TOKENS, _HIDDEN, generator=random) * torch.pow(2.0, exponents)
    x[:, _GROUP : 2 * _GROUP] = 0
    return _Batch(
        x.bfloat16(),
        torch.randint(-1, _EXPERTS, (_TOKENS, _TOP_K), generator=random),
        0.5 * torch.randint(1, 4, (_TOKENS, _TOP_K), generator=random),
        torch.randint(0, _TOKENS + 1, (1,), generator=random, dtype=torch.int32),
    )


def quantise(x: torch.Tensor, quantisation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales as torch computes them."""
    groups = x.float().unflatten(1, (-1, _GROUP))
    scales = groups.abs().amax(-1).clamp(min=1e-10) / 448
    if quantisation != "fp8":
        scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
    codes = (groups / scales.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(1), scales.to(torch.float8_e8m0fnu) if quantisation == "fp8_ue8m0" else scales


def play(all_to_all: AllToAll, rounds: int) -> None:
    """Play rounds with counts, and check every byte that arrives and comes back."""
    own = torch.tensor(all_to_all.local_experts)
    for seed in range(rounds):
        batches = [_batch(rank, seed) for rank in range(all_to_all.world_size)]
        mine = batches[all_to_all.rank]
        got, handle = all_to_all.dispatch(mine.x, mine.ids, mine.weights, count=mine.count)
        sent, ids = [], []
        for batch in batches:
            counted = slice(0, int(batch.count))
            here = torch.isin(batch.ids[counted], own).any(1)
            sent.append(batch.x[counted][here])
            ids.append(batch.ids[counted][here])
        codes, scales = quantise(torch.cat(sent), all_to_all.config.quantisation)
        assert got.scales is not None
        assert got.topk_ids is not None
        assert got.scales.dtype == scales.dtype
        assert torch.equal(got.topk_ids.long(), torch.cat(ids))
        assert torch.equal(got.x.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(got.scales.view(torch.uint8), scales.view(torch.uint8))
        out = torch.full((_TOKENS, _HIDDEN), -7.0)
        ones = torch.ones(len(codes), _HIDDEN)
        all_to_all.combine(ones, handle, out)
        owners = torch.tensor(all_to_all.config.placement(all_to_all.world_size))
        for token in range(_TOKENS):
            named = mine.ids[token][mine.ids[token] >= 0]
            want = -7.0 if token >= int(mine.count) else float(len(owners[named].unique()))
            assert (out[token] == want).all(), (token, want)
