"""The inputs of one measured cell, and the oracle that every contestant's results are checked against.

Every rank can derive every other rank's inputs from the seed, so the oracle needs no communication.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError, EfaEpError


class Format(NamedTuple):
    """How rows travel: dtype on dispatch, dtype on combine, elements per float32 scale (0: no scales)."""

    dispatch: torch.dtype
    combine: torch.dtype
    block: int


FORMATS = {
    "bf16": Format(torch.bfloat16, torch.bfloat16, 0),
    "fp32": Format(torch.float32, torch.float32, 0),
    "fp8": Format(torch.float8_e4m3fn, torch.bfloat16, 128),
}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        world: Ranks.
        ranks_per_node: Ranks that share memory; 1 makes every rank its own node.
        hidden: Elements of a token's activation.
        dtype: A name of ``FORMATS``.
        tokens: Tokens per rank.
        experts: Experts of the layer, spread evenly over the ranks.
        top_k: Experts per token, chosen uniformly.

    """

    world: int
    ranks_per_node: int
    hidden: int
    dtype: str
    tokens: int
    experts: int = 256
    top_k: int = 8

    @property
    def format(self) -> Format:
        """How rows travel."""
        return FORMATS[self.dtype]

    @property
    def nodes(self) -> int:
        """Groups of ranks that share memory."""
        return self.world // self.ranks_per_node

    @property
    def scale_columns(self) -> int:
        """Scales of one token."""
        return self.hidden // self.format.block if self.format.block else 0

    @property
    def row_bytes(self) -> int:
        """Payload bytes of one dispatched token, its scales included."""
        return self.hidden * self.format.dispatch.itemsize + 4 * self.scale_columns

    @property
    def combine_row_bytes(self) -> int:
        """Payload bytes of one result."""
        return self.hidden * self.format.combine.itemsize

    def config(self, device: str = "cpu") -> AllToAllConfig:
        """Return what this package measures it with."""
        return AllToAllConfig(
            hidden_size=self.hidden,
            num_experts=self.experts,
            top_k=self.top_k,
            max_tokens_per_rank=self.tokens,
            dtype=self.format.dispatch,
            combine_dtype=self.format.combine,
            scale_columns=self.scale_columns,
            device=device,
        )

    def check(self) -> None:
        """Raise ``ConfigurationError`` for a cell that cannot be measured."""
        if not 1 <= self.top_k <= self.experts:
            raise ConfigurationError(
                f"--top-k {self.top_k} of --experts {self.experts} cannot be chosen; use 1 to "
                f"{self.experts}, or more experts"
            )
        if self.world < 1 or self.experts % self.world != 0:
            raise ConfigurationError(
                f"{self.experts} experts do not divide among {self.world} ranks, and the peers need that; "
                "choose --experts accordingly, for example 288 for 24 ranks"
            )
        if self.ranks_per_node < 1 or self.world % self.ranks_per_node != 0:
            raise ConfigurationError(f"{self.world} ranks do not divide into nodes of {self.ranks_per_node}")
        if self.format.block and self.hidden % self.format.block != 0:
            raise ConfigurationError(
                f"hidden size {self.hidden} is not a multiple of {self.format.block}, the block of an fp8 "
                "scale; use for example 7168"
            )
        self.config().check(self.world, self.ranks_per_node)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return asdict(self)


@dataclass
class Inputs:
    """What one rank brings: x ``[T, H]``, its scales ``[T, S]`` fp32, ids ``[T, K]`` int32, weights fp32."""

    x: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the activations in float32: ``x`` times the scale of its block."""
        values = self.x.float()
        if self.scales is None:
            return values
        blocks = values.view(*self.scales.shape, -1)
        return (blocks * self.scales.unsqueeze(-1)).view_as(values)


class WrongResultError(EfaEpError):
    """A contestant's result differs from the oracle's."""


class Problem:
    """One rank's view of a cell.

    Experts are the identity, so an owner's output for a token is the token times the sum of the weights that
    the owner's experts have for it, and the combined result is the token times the sum of all its weights.
    The expert outputs are computed here, once, because no contestant's time includes them.

    Attributes:
        device: Where its tensors are.
        inputs: This rank's inputs.
        owners: ``[T, W]`` bool: which ranks own experts of which of this rank's tokens.
        sent_rows: Rows (tokens) from this rank to each rank, itself included.
        received_rows: Rows from each rank to this rank.
        expert_output: ``[M, H]``: outputs for the tokens that reach this rank, in (source rank, token) order.
        expert_output_of_all: ``[W * T, H]``: the same for all tokens, zero for those without an expert here.
        out: ``[T, H]``: where combine puts its result.

    """

    def __init__(self, cell: Cell, rank: int, seed: int, device: str = "cpu") -> None:
        """Build the inputs and expert outputs of ``rank``; ``"cuda"`` is torch's current GPU."""
        self.device = torch.device(device)
        self._on_gpu = device == "cuda"
        self.cell = cell
        self.rank = rank
        self._seed = seed
        self.experts_per_rank = cell.experts // cell.world
        combine = cell.format.combine
        rows_of_all = cell.world * cell.tokens
        self.expert_output_of_all = torch.empty(rows_of_all, cell.hidden, dtype=combine, device=self.device)
        routed = torch.empty(rows_of_all, dtype=torch.bool, device=self.device)
        self.received_rows = []
        for source, inputs in self._all_inputs():
            if source == rank:
                self.inputs = inputs
            here = inputs.ids // self.experts_per_rank == rank
            rows = slice(source * cell.tokens, (source + 1) * cell.tokens)
            routed[rows] = here.any(1)
            self.received_rows.append(int(routed[rows].sum()))
            weight = (inputs.weights * here).sum(1, keepdim=True)
            torch.mul(inputs.values().to(combine), weight.to(combine), out=self.expert_output_of_all[rows])
        self.expert_output = self.expert_output_of_all[routed]
        owner_of = (self.inputs.ids // self.experts_per_rank).long()
        self.owners = torch.zeros(cell.tokens, cell.world, dtype=torch.bool, device=self.device)
        self.owners.scatter_(1, owner_of, True)
        self.sent_rows = [int(count) for count in self.owners.sum(0)]
        self.out = torch.empty(cell.tokens, cell.hidden, dtype=combine, device=self.device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given; the CPU has."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def wire_floor_bytes(self) -> int:
        """Return the fewest payload bytes between nodes for this rank's tokens: one row per (token, node)."""
        cell = self.cell
        nodes = self.owners.view(cell.tokens, cell.nodes, cell.ranks_per_node).any(2)
        nodes[:, self.rank // cell.ranks_per_node] = False
        return int(nodes.sum()) * (cell.row_bytes + cell.combine_row_bytes)

    def _all_inputs(self) -> Iterator[tuple[int, Inputs]]:
        for source in range(self.cell.world):
            yield source, self._inputs_of(source)

    def _inputs_of(self, rank: int) -> Inputs:
        cell = self.cell
        generator = torch.Generator().manual_seed(self._seed * 1000 + rank)
        scores = torch.rand(cell.tokens, cell.experts, generator=generator)
        weights = torch.rand(cell.tokens, cell.top_k, generator=generator) + 0.5
        x = torch.rand(cell.tokens, cell.hidden, generator=generator) * 2 - 1
        scales = None
        if cell.scale_columns:
            scales = torch.rand(cell.tokens, cell.scale_columns, generator=generator) + 0.5
            scales = scales.to(self.device)
        ids = scores.topk(cell.top_k).indices.to(torch.int32)
        x = x.to(cell.format.dispatch)
        return Inputs(x.to(self.device), scales, ids.to(self.device), weights.to(self.device))

    def check_dispatch(
        self,
        name: str,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        of_all: bool,
    ) -> None:
        """Raise ``WrongResultError`` unless the dispatched rows are bit for bit what the sources sent.

        Args:
            name: The contestant, for the message.
            x: Rows in (source rank, token) order.
            scales: Their scales, if the cell has any.
            ids: Their expert ids ``[rows, K]``.
            weights: Their weights ``[rows, K]``.
            of_all: Whether every token arrives at every rank, or only those with an expert there.

        """
        first = 0
        for source, inputs in self._all_inputs():
            wanted = inputs.ids // self.experts_per_rank == self.rank
            rows = torch.ones_like(wanted[:, 0]) if of_all else wanted.any(1)
            last = first + int(rows.sum())
            compared = [("x", x, inputs.x), ("ids", ids, inputs.ids), ("weights", weights, inputs.weights)]
            if scales is not None and inputs.scales is not None:
                compared.append(("scales", scales, inputs.scales))
            for what, got, expected in compared:
                same = torch.equal(as_bytes(got[first:last]), as_bytes(expected)[rows])
                if not same:
                    raise WrongResultError(
                        f"{name}: dispatched {what} from rank {source} differ: {self.cell}"
                    )
            first = last
        if x.shape[0] != first:
            raise WrongResultError(f"{name}: {x.shape[0]} rows dispatched, expected {first}: {self.cell}")

    def check_out(self, name: str, out: torch.Tensor) -> None:
        """Raise ``WrongResultError`` unless ``out`` is the combined result within rounding.

        All terms of a sum have the same sign, so each of its roundings costs at most half an epsilon: float32
        sums of weights, then in the combine dtype the value, the weight, the product and one sum per rank.
        """
        expected = self.inputs.values().double() * self.inputs.weights.double().sum(1, keepdim=True)
        roundings = self.cell.top_k * torch.finfo(torch.float32).eps
        roundings += (3 + self.cell.world) * torch.finfo(self.cell.format.combine).eps
        wrong = ~torch.isclose(out.double(), expected, rtol=roundings / 2, atol=1e-30)
        if wrong.any():
            raise WrongResultError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} results differ: {self.cell}"
            )


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Return ``[rows, bytes]`` of a table, since few operators know every dtype."""
    return rows.contiguous().view(torch.uint8)
