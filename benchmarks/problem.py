"""The inputs of one measured cell, and the oracle that every contestant's results are checked against.

Every rank can derive every other rank's inputs from the seed, so the oracle needs no communication.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

NUM_EXPERTS = 256
TOP_K = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        scene: ``same_node`` (ranks share memory) or ``own_node`` (every rank is its own node).
        world: Ranks.
        hidden: Elements of a token's activation.
        dtype: ``bf16`` or ``fp32``, of activations and expert outputs.
        tokens: Tokens per rank.

    """

    scene: str
    world: int
    hidden: int
    dtype: str
    tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Payload bytes of one token."""
        return self.hidden * self.torch_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return asdict(self)


@dataclass
class Inputs:
    """What one rank brings: x ``[T, H]``, ids ``[T, K]`` int32, weights ``[T, K]`` fp32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class WrongResultError(Exception):
    """A contestant's result differs from the oracle's."""


class Problem:
    """One rank's view of a cell.

    Experts are the identity, so an owner's output for a token is the token times the sum of the weights that
    the owner's experts have for it, and the combined result is the token times the sum of all its weights.
    The expert outputs are computed here, once, because no contestant's time includes them.

    Attributes:
        inputs: This rank's inputs.
        owners: ``[T, W]`` bool: which ranks own experts of which of this rank's tokens.
        sent_rows: Rows (tokens) from this rank to each rank, itself included.
        received_rows: Rows from each rank to this rank.
        expert_output: ``[M, H]``: outputs for the tokens that reach this rank, in (source rank, token) order.
        expert_output_of_all: ``[W * T, H]``: the same for all tokens, zero for those without an expert here.
        out: ``[T, H]``: where combine puts its result.

    """

    def __init__(self, cell: Cell, rank: int, seed: int) -> None:
        """Build the inputs and expert outputs of ``rank``."""
        self.cell = cell
        self.rank = rank
        self._seed = seed
        self.experts_per_rank = NUM_EXPERTS // cell.world
        shape = (cell.world * cell.tokens, cell.hidden)
        self.expert_output_of_all = torch.empty(shape, dtype=cell.torch_dtype)
        routed = torch.empty(cell.world * cell.tokens, dtype=torch.bool)
        self.received_rows = []
        for source, inputs in self._all_inputs():
            if source == rank:
                self.inputs = inputs
            here = inputs.ids // self.experts_per_rank == rank
            rows = slice(source * cell.tokens, (source + 1) * cell.tokens)
            routed[rows] = here.any(1)
            self.received_rows.append(int(routed[rows].sum()))
            weight = (inputs.weights * here).sum(1, keepdim=True)
            torch.mul(inputs.x, weight.to(cell.torch_dtype), out=self.expert_output_of_all[rows])
        self.expert_output = self.expert_output_of_all[routed]
        owner_of = (self.inputs.ids // self.experts_per_rank).long()
        self.owners = torch.zeros(cell.tokens, cell.world, dtype=torch.bool).scatter_(1, owner_of, True)
        self.sent_rows = [int(count) for count in self.owners.sum(0)]
        self.out = torch.empty_like(self.inputs.x)

    def _all_inputs(self) -> Iterator[tuple[int, Inputs]]:
        for source in range(self.cell.world):
            yield source, self._inputs_of(source)

    def _inputs_of(self, rank: int) -> Inputs:
        cell = self.cell
        generator = torch.Generator().manual_seed(self._seed * 1000 + rank)
        scores = torch.rand(cell.tokens, NUM_EXPERTS, generator=generator)
        weights = torch.rand(cell.tokens, TOP_K, generator=generator) + 0.5
        x = torch.empty(cell.tokens, cell.hidden, dtype=cell.torch_dtype)
        x.uniform_(-1, 1, generator=generator)
        return Inputs(x, scores.topk(TOP_K).indices.to(torch.int32), weights)

    def check_dispatch(
        self, name: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, of_all: bool
    ) -> None:
        """Raise ``WrongResultError`` unless the dispatched rows are bit for bit what the sources sent.

        Args:
            name: The contestant, for the message.
            x: Rows in (source rank, token) order.
            ids: Their expert ids ``[rows, K]``.
            weights: Their weights ``[rows, K]``.
            of_all: Whether every token arrives at every rank, or only those with an expert there.

        """
        first = 0
        for source, inputs in self._all_inputs():
            wanted = inputs.ids // self.experts_per_rank == self.rank
            rows = torch.ones(self.cell.tokens, dtype=torch.bool) if of_all else wanted.any(1)
            last = first + int(rows.sum())
            for what, got, expected in (
                ("x", x, inputs.x),
                ("ids", ids, inputs.ids),
                ("weights", weights, inputs.weights),
            ):
                if not torch.equal(got[first:last], expected[rows]):
                    raise WrongResultError(
                        f"{name}: dispatched {what} from rank {source} differ: {self.cell}"
                    )
            first = last
        if x.shape[0] != first:
            raise WrongResultError(f"{name}: {x.shape[0]} rows dispatched, expected {first}: {self.cell}")

    def check_out(self, name: str, out: torch.Tensor) -> None:
        """Raise ``WrongResultError`` unless ``out`` is the combined result within rounding.

        All terms of a sum have the same sign, so each of its roundings costs at most half an epsilon: float32
        sums of weights, then in the cell's dtype the weight, the product and one sum per rank.
        """
        expected = self.inputs.x.double() * self.inputs.weights.double().sum(1, keepdim=True)
        roundings = TOP_K * torch.finfo(torch.float32).eps
        roundings += (2 + self.cell.world) * torch.finfo(self.cell.torch_dtype).eps
        wrong = ~torch.isclose(out.double(), expected, rtol=roundings / 2, atol=1e-30)
        if wrong.any():
            raise WrongResultError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} results differ: {self.cell}"
            )
