"""What a round must do, written from the documentation of ``AllToAll`` in plain torch.

It knows nothing of nodes, chunks or forwarding: rows in (source rank, token) order, and per token the
weighted sum of its experts' outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_efa_ep import AllToAllConfig, Dispatched

# Unit roundoff and half of the smallest positive number.
_ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True)
class Batch:
    """What one rank dispatches in one round."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    scales: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.x.shape[0]

    def experts_of(self, token: int) -> list[int]:
        """Expert ids of a token, one per slot that is not dropped."""
        return [expert for expert in self.topk_ids[token].tolist() if expert >= 0]


def expert_output(
    config: AllToAllConfig, x: torch.Tensor, scales: torch.Tensor | None, expert: int
) -> torch.Tensor:
    """Return ``[n, H]`` results of the model's toy expert: dequantise, repeat to H columns, multiply."""
    values = x.float()
    column = torch.arange(config.hidden_size)
    result = values[:, column % config.columns]
    if scales is not None:
        result = result * scales[:, column % config.scale_columns]
    return (result * (1 + expert % 2)).to(config.combine_dtype)


def rows_for(batches: Sequence[Batch], experts: set[int]) -> list[tuple[int, int]]:
    """Return (source rank, token) of every token that names one of ``experts``, in order."""
    return [
        (source, token)
        for source, batch in enumerate(batches)
        for token in range(batch.tokens)
        if experts.intersection(batch.experts_of(token))
    ]


def check_dispatched(
    config: AllToAllConfig, batches: Sequence[Batch], local_experts: Sequence[int], got: Dispatched
) -> None:
    """Compare everything a rank received, bit by bit."""
    if config.layout == "per_token":
        rows = rows_for(batches, set(local_experts))
        counts = [
            sum(batches[source].experts_of(token).count(expert) for source, token in rows)
            for expert in local_experts
        ]
        _same("tokens_per_expert", got.tokens_per_expert, torch.tensor(counts, dtype=torch.int32))
        _same_rows("x", got.x, [batches[source].x[token] for source, token in rows], config.columns)
        assert got.topk_ids is not None
        assert got.topk_weights is not None
        ids = [batches[source].topk_ids[token].int() for source, token in rows]
        _same_rows("topk_ids", got.topk_ids, ids, config.top_k)
        weights = [batches[source].topk_weights[token] for source, token in rows]
        _same_rows("topk_weights", got.topk_weights, weights, config.top_k)
        _check_scales(config, batches, rows, got.scales)
        return
    assert got.topk_ids is None
    assert got.topk_weights is None
    capacity = len(batches) * config.max_tokens_per_rank
    assert got.x.shape == (len(local_experts), capacity, config.columns)
    by_expert = [rows_for(batches, {expert}) for expert in local_experts]
    counts = [len(rows) for rows in by_expert]
    _same("tokens_per_expert", got.tokens_per_expert, torch.tensor(counts, dtype=torch.int32))
    for local, rows in enumerate(by_expert):
        expected = [batches[source].x[token] for source, token in rows]
        _same_rows(f"x[{local}]", got.x[local, : len(rows)], expected, config.columns)
        _check_scales(config, batches, rows, None if got.scales is None else got.scales[local, : len(rows)])


def compute_experts(
    config: AllToAllConfig, local_experts: Sequence[int], got: Dispatched, per_slot: bool, weighted: bool
) -> torch.Tensor:
    """Do the experts' work on received rows; places that must not be read hold NaN.

    Args:
        config: The configuration.
        local_experts: Global ids of the rank's experts.
        got: What the rank received.
        per_slot: per_token layout: return ``[M, K, H]`` instead of ``[M, H]``.
        weighted: Multiply with the router weights here. ``[M, H]`` always is.

    """
    if config.layout == "per_expert":
        result = torch.full((*got.x.shape[:2], config.hidden_size), torch.nan, dtype=config.combine_dtype)
        for local, count in enumerate(got.tokens_per_expert.tolist()):
            scales = None if got.scales is None else got.scales[local, :count]
            result[local, :count] = expert_output(config, got.x[local, :count], scales, local_experts[local])
        return result
    assert got.topk_ids is not None
    assert got.topk_weights is not None
    shape = (got.x.shape[0], config.top_k, config.hidden_size)
    slots = torch.full(shape, torch.nan, dtype=config.combine_dtype)
    total = torch.zeros(shape[0], config.hidden_size)
    for expert in local_experts:
        rows, slot = torch.nonzero(got.topk_ids == expert, as_tuple=True)
        scales = None if got.scales is None else got.scales[rows]
        output = expert_output(config, got.x[rows], scales, expert)
        weight = got.topk_weights[rows, slot, None]
        slots[rows, slot] = (output.float() * weight).to(config.combine_dtype) if weighted else output
        total.index_add_(0, rows, output.float() * weight)
    return slots if per_slot else total.to(config.combine_dtype)


def check_combined(
    config: AllToAllConfig, batch: Batch, weighted: bool, exact: bool, got: torch.Tensor
) -> None:
    """Compare a rank's result with the weighted sum in float64.

    Args:
        config: The configuration.
        batch: What the rank dispatched.
        weighted: Whether the router weights count.
        exact: Whether all sums can be represented, so that the result must be equal.
        got: ``[T, H]``.

    """
    expected = torch.zeros(batch.tokens, config.hidden_size, dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for expert in set(batch.topk_ids.flatten().tolist()) - {-1}:
        tokens, slot = torch.nonzero(batch.topk_ids == expert, as_tuple=True)
        scales = None if batch.scales is None else batch.scales[tokens]
        term = expert_output(config, batch.x[tokens], scales, expert).double()
        if weighted:
            term = term * batch.topk_weights[tokens, slot, None].double()
        expected.index_add_(0, tokens, term)
        magnitude.index_add_(0, tokens, term.abs())
    assert got.dtype == config.combine_dtype
    assert got.shape == expected.shape
    error = (got.double() - expected).abs()
    bound = torch.zeros_like(error) if exact else rounding_bound(config, magnitude)
    worst = (error - bound).flatten()
    assert bool((worst <= 0).all()), (  # NaN fails, too
        f"{int((~(worst <= 0)).sum())} of {worst.numel()} results are off; worst error {error.max():g} "
        f"where {bound.flatten()[worst.argmax()]:g} is allowed"
    )


def rounding_bound(config: AllToAllConfig, magnitude: torch.Tensor) -> torch.Tensor:
    """Return how far a result may be off, given the sum of its terms' absolute values.

    A term is rounded to ``combine_dtype`` at most four times (by the expert that weights it, as a row's
    partial sum, as the node's sum, as the result) and takes part in at most 3 K float32 operations; each of
    at most 3 K + 1 rounded values may be subnormal.
    """
    unit, half_smallest = _ROUNDING[config.combine_dtype]
    unit32, _ = _ROUNDING[torch.float32]
    relative = (1 + unit) ** 4 * (1 + unit32) ** (3 * config.top_k) - 1
    return magnitude * relative + (3 * config.top_k + 1) * 2 * half_smallest


def _check_scales(
    config: AllToAllConfig, batches: Sequence[Batch], rows: list[tuple[int, int]], got: torch.Tensor | None
) -> None:
    if config.scale_columns == 0:
        assert got is None
        return
    assert got is not None
    scales = [batch.scales for batch in batches]
    expected = [scales[source][token] for source, token in rows]  # type: ignore[index]
    _same_rows("scales", got, expected, config.scale_columns)


def _same_rows(name: str, got: torch.Tensor, rows: list[torch.Tensor], columns: int) -> None:
    _same(name, got, torch.stack(rows) if rows else torch.empty((0, columns), dtype=got.dtype))


def _same(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype, f"{name} has dtype {got.dtype}, not {expected.dtype}"
    assert got.shape == expected.shape, f"{name} has shape {list(got.shape)}, not {list(expected.shape)}"
    if got.numel() > 0:  # bytes, since NaNs must arrive unchanged as well
        same = got.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
        assert bool(same.all()), f"{name} differs in {int((~same).sum())} bytes of {same.numel()}"
