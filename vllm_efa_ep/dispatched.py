"""The received rows of a round, and the buffers they lie in."""

from functools import partial
from typing import NamedTuple

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.argument_checks import EXCHANGE
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.rank_memory import RankMemory


class Dispatched(NamedTuple):
    """Rows for this rank's experts, in (source rank, token) order.

    The tensors are views of the channel's buffers: valid until the next ``dispatch_recv`` on the channel.

    Attributes:
        x: ``[M, columns]``, or ``[local experts, capacity, columns]`` in the per_expert layout.
        scales: float32, like ``x`` with S columns; with quantisation ``AllToAllConfig.scale_dtype``, with a
            column per 128 of ``x``; None without scales.
        topk_ids: int32 ``[M, K]``, the global ids the token was routed to (experts of other ranks included);
            None in the per_expert layout.
        topk_weights: float32 ``[M, K]``; None in the per_expert layout.
        tokens_per_expert: int32 ``[local experts]``. per_expert: rows in use of each expert, to which a token
            that names an expert twice contributes one. per_token: slots of ``topk_ids`` that name the expert,
            to which such a token contributes two.

    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor


class OutputBuffers:
    """A channel's received rows. Kept from round to round: fresh memory would cost more than the copies."""

    def __init__(self, config: AllToAllConfig, local_experts: int, capacity: int, memory: RankMemory) -> None:
        """Allocate for ``local_experts`` experts of at most ``capacity`` rows each, where ``memory`` is."""
        self._config = config
        self._capacity = capacity
        self._device = memory.device
        self._tokens_per_expert = torch.zeros(local_experts, dtype=torch.int32, device=self._device)
        self._rows: int | None = None  # of the round in flight, once they are here
        if config.layout == "per_expert":
            self.room = capacity
            self._allocate((local_experts, capacity), with_routing=False)
        else:
            self.room = memory.first_room(capacity)
            self._allocate((self.room,), with_routing=True)

    @property
    def rows(self) -> int:
        """Rows of the round in flight.

        Raises:
            ConfigurationError: They are not here yet: those of an older round may still be read by others.

        """
        if self._rows is None:
            raise ConfigurationError("the rows of this round are not here yet; call dispatch_recv first")
        return self._rows

    def start_round(self) -> None:
        """Forget how many rows the last round had."""
        self._rows = None

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` rows, at least."""
        self.room = min(self._capacity, max(rows, 2 * self.room))
        self._allocate((self.room,), with_routing=True)

    def views(self, rows: int) -> Dispatched:
        """Return the first ``rows`` rows."""
        self._rows = rows
        if self._config.layout == "per_expert":
            return self._whole
        x, topk_ids, topk_weights, *scales = self._views.first(rows)
        return Dispatched(x, scales[0] if scales else None, topk_ids, topk_weights, self._tokens_per_expert)

    def _allocate(self, shape: tuple[int, ...], with_routing: bool) -> None:
        config, empty = self._config, partial(torch.empty, device=self._device)
        self._whole = whole = Dispatched(
            empty((*shape, config.columns), dtype=config.dtype),
            empty((*shape, config.received_scales), dtype=config.scale_dtype)
            if config.received_scales
            else None,
            empty((*shape, config.top_k), dtype=torch.int32) if with_routing else None,
            empty((*shape, config.top_k), dtype=torch.float32) if with_routing else None,
            self._tokens_per_expert,
        )
        tensors = (whole.x, whole.scales, whole.topk_ids, whole.topk_weights, whole.tokens_per_expert)
        tables = (whole.x, whole.topk_ids, whole.topk_weights, whole.scales) if with_routing else ()
        self._views = _core.RowViews(EXCHANGE, [table for table in tables if table is not None])
        self.addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
