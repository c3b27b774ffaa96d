"""What the ranks of an ``AllToAll`` have to agree on, and the bounds of each value."""

from collections import Counter
from dataclasses import dataclass
from operator import index
from typing import Literal

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.memory_plan import MemoryPlan
from vllm_efa_ep.placement import linear_placement

Layout = Literal["per_token", "per_expert"]
Quantisation = Literal["none", "fp8", "fp8_power_of_2", "fp8_ue8m0"]

COMBINE_TYPES = {
    torch.bfloat16: _core.ScalarType.bfloat16,
    torch.float16: _core.ScalarType.float16,
    torch.float32: _core.ScalarType.float32,
}
# Payloads are only copied, so any element type goes; these are the ones models use.
_PAYLOAD_TYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
)
QUANTISATIONS = {
    "none": _core.Quantisation.none,
    "fp8": _core.Quantisation.fp8,
    "fp8_power_of_2": _core.Quantisation.fp8_power_of_2,
    "fp8_ue8m0": _core.Quantisation.fp8_ue8m0,
}
_ROW_ALIGNMENT = 16
SCALE_GROUP = 128
"""Elements that share a scale of ``quantisation``."""


@dataclass(frozen=True)
class AllToAllConfig:
    """What all ranks have to agree on.

    Attributes:
        hidden_size: Elements of one token's expert output; H below.
        num_experts: Physical experts of the whole world.
        top_k: Experts per token; K below.
        max_tokens_per_rank: Most tokens a rank dispatches in one round.
        dtype: Element type of the dispatched activations.
        combine_dtype: Element type of expert outputs and of the result.
        payload_columns: Elements of one dispatched activation, if not H (packed formats: fp4 in uint8).
        scale_columns: float32 block scales per token, 0 for none; S below.
        quantisation: ``fp8``: ``dispatch_send`` takes bfloat16 and makes float8_e4m3fn of it, with a float32
            scale per 128 elements, the largest magnitude / 448. ``fp8_power_of_2``: the same with scales
            rounded up to powers of two. ``fp8_ue8m0``: these as float8_e8m0fnu. ``none``: rows travel as
            they are.
        layout: ``per_token``: received rows ``[M, H]``. ``per_expert``: ``[experts, capacity, H]``.
        channels: Rounds that can be in flight at once, 1 or 2.
        expert_to_rank: Owner rank of every expert; None places them linearly.
        device: Where tokens are: ``cpu``, ``cuda`` (torch's current GPU), or ``auto``: cuda if torch
            has it.

    """

    hidden_size: int
    num_experts: int
    top_k: int
    max_tokens_per_rank: int
    dtype: torch.dtype = torch.bfloat16
    combine_dtype: torch.dtype = torch.bfloat16
    payload_columns: int | None = None
    scale_columns: int = 0
    quantisation: Quantisation = "none"
    layout: Layout = "per_token"
    channels: int = 1
    expert_to_rank: tuple[int, ...] | None = None
    device: str = "auto"

    @property
    def columns(self) -> int:
        """Elements of one dispatched activation."""
        return self.hidden_size if self.payload_columns is None else self.payload_columns

    @property
    def input_dtype(self) -> torch.dtype:
        """Element type of what ``dispatch_send`` takes."""
        return self.dtype if self.quantisation == "none" else torch.bfloat16

    @property
    def received_scales(self) -> int:
        """Scales of one received row."""
        return self.scale_columns if self.quantisation == "none" else self.columns // SCALE_GROUP

    @property
    def scale_dtype(self) -> torch.dtype:
        """Their element type."""
        return torch.float8_e8m0fnu if self.quantisation == "fp8_ue8m0" else torch.float32

    def placement(self, world_size: int) -> tuple[int, ...]:
        """Return the owner of every expert."""
        if self.expert_to_rank is not None:
            return tuple(self.expert_to_rank)
        return linear_placement(self.num_experts, world_size)

    def memory_plan(self, world_size: int, ranks_per_node: int, rank: int | None = None) -> MemoryPlan:
        """Return the memory one rank of such a world takes, without allocating any.

        Args:
            world_size: Number of ranks.
            ranks_per_node: Ranks of a node.
            rank: Which; default: one that owns most experts, which takes most.

        Raises:
            ConfigurationError: A value is out of bounds.

        """
        self.check(world_size, ranks_per_node)
        experts = Counter(self.placement(world_size))
        local_experts = max(experts.values()) if rank is None else experts[rank]
        capacity = world_size * self.max_tokens_per_rank
        received_rows = self.received_bytes(local_experts, capacity)
        return MemoryPlan.of(self.core_layout(world_size, ranks_per_node), received_rows)

    def received_bytes(self, local_experts: int, rows: int) -> int:
        """Return the bytes of a channel's received rows: ``rows`` of each expert, or of all in per_token."""
        row_bytes = self.columns * self.dtype.itemsize + self.received_scales * self.scale_dtype.itemsize
        if self.layout == "per_expert":
            rows *= local_experts
        else:
            row_bytes += self.top_k * (torch.int32.itemsize + torch.float32.itemsize)  # ids and weights
        return rows * row_bytes + local_experts * torch.int32.itemsize  # tokens_per_expert

    def core_layout(self, world_size: int, ranks_per_node: int) -> _core.Layout:
        """Return the arena's layout."""
        return _core.Layout(
            world=world_size,
            ranks_per_node=ranks_per_node,
            top_k=self.top_k,
            payload_bytes=self.columns * self.dtype.itemsize,
            scale_bytes=self.received_scales * self.scale_dtype.itemsize,
            combine_bytes=self.hidden_size * self.combine_dtype.itemsize,
            max_tokens=self.max_tokens_per_rank,
            channels=self.channels,
        )

    def check(self, world_size: int, ranks_per_node: int) -> None:
        """Raise ``ConfigurationError`` for the first value outside the protocol's bounds."""
        limits = _core.limits()
        _check_range("world size", world_size, 1, limits["ranks"])
        _check_range("ranks per node", ranks_per_node, 1, world_size)
        if world_size % ranks_per_node:
            raise ConfigurationError(
                f"{world_size} ranks do not divide into nodes of {ranks_per_node}; use a divisor of "
                f"{world_size}"
            )
        _check_range("number of nodes", world_size // ranks_per_node, 1, limits["nodes"])
        _check_range("num_experts", self.num_experts, 1, limits["experts"])
        _check_range("top_k", self.top_k, 1, limits["top_k"])
        _check_range("max_tokens_per_rank", self.max_tokens_per_rank, 1, limits["tokens_per_rank"])
        _check_range("channels", self.channels, 1, limits["channels"])
        _check_range("hidden_size", self.hidden_size, 1, 2**20)
        _check_range("payload_columns", self.columns, 1, 2**20)
        _check_range("scale_columns", self.scale_columns, 0, 2**16)
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("layout", self.layout, ("per_token", "per_expert"))
        _check_choice("dtype", self.dtype, _PAYLOAD_TYPES)
        _check_choice("combine_dtype", self.combine_dtype, tuple(COMBINE_TYPES))
        _check_choice("quantisation", self.quantisation, tuple(QUANTISATIONS))
        if self.quantisation != "none":
            self._check_quantisation()
        for name, columns, dtype in (
            ("dispatched row", self.columns, self.dtype),
            ("combined row", self.hidden_size, self.combine_dtype),
        ):
            row_bytes = columns * dtype.itemsize
            if row_bytes % _ROW_ALIGNMENT:
                step = _ROW_ALIGNMENT // dtype.itemsize
                raise ConfigurationError(
                    f"a {name} of {columns} x {dtype} has {row_bytes} bytes, not a multiple of "
                    f"{_ROW_ALIGNMENT}; use a hidden size that is a multiple of {step}"
                )
        if self.expert_to_rank is not None and len(self.expert_to_rank) != self.num_experts:
            raise ConfigurationError(
                f"expert_to_rank has {len(self.expert_to_rank)} entries for {self.num_experts} experts; "
                "give one owner per expert"
            )
        for expert, owner in enumerate(self.placement(world_size)):
            _check_range(f"expert_to_rank[{expert}]", owner, 0, world_size - 1)

    def _check_quantisation(self) -> None:
        if self.dtype != torch.float8_e4m3fn:
            raise ConfigurationError(
                f"quantisation {self.quantisation!r} makes float8_e4m3fn, but dtype is {self.dtype}; set "
                "dtype=torch.float8_e4m3fn"
            )
        if self.columns % SCALE_GROUP:
            raise ConfigurationError(
                f"quantisation needs rows of whole groups of {SCALE_GROUP} elements, but they have "
                f"{self.columns}; quantise before dispatch, with scale_columns"
            )
        if self.scale_columns:
            raise ConfigurationError(
                f"scale_columns is {self.scale_columns}, but with quantisation the scales are made on the "
                "way; set it to 0"
            )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    try:
        index(value)
    except TypeError:
        raise ConfigurationError(f"{name} is {value!r}, no integer; use {low} to {high}") from None
    if not low <= value <= high:
        raise ConfigurationError(f"{name} is {value}; use {low} to {high}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; use one of {', '.join(map(str, choices))}")
