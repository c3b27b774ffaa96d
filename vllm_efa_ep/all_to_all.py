"""The public API: dispatch tokens to the ranks of their experts, and combine the results.

A round on a channel is ``dispatch_send``, ``dispatch_recv``, ``combine_send``, ``combine_recv``. The send
halves return at once, so the caller can compute between the halves while data flies::

    a2a = AllToAll(AllToAllConfig(...), TorchBootstrap(group))
    handle = a2a.dispatch_send(x, topk_ids, topk_weights)
    dispatched = a2a.dispatch_recv(handle)
    a2a.combine_send(experts(dispatched.x, ...), handle)
    out = a2a.combine_recv(handle)
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch

from vllm_efa_ep import __version__, _core
from vllm_efa_ep.all_to_all_config import COMBINE_TYPES, AllToAllConfig
from vllm_efa_ep.arena_views import activations, results
from vllm_efa_ep.argument_checks import check, checked
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.closing import wait_for_all
from vllm_efa_ep.config import Settings
from vllm_efa_ep.connection import Connection, connect
from vllm_efa_ep.diagnosis import explain
from vllm_efa_ep.dispatched import Dispatched, OutputBuffers
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    RankLostError,
    RankTimeoutError,
    TransportError,
)
from vllm_efa_ep.memory_plan import MemoryPlan
from vllm_efa_ep.placement import experts_of
from vllm_efa_ep.stats import Stats
from vllm_efa_ep.world import join_world

logger = logging.getLogger(__name__)

# Part of the deadline kept for finding out which rank is at fault.
_DIAGNOSIS_SHARE = 0.1

__all__ = ["AllToAll", "AllToAllConfig", "Dispatched", "Handle"]


class Handle(NamedTuple):
    """A round in flight: returned by ``dispatch_send``, taken by the other halves.

    Attributes:
        channel: The channel it runs on.
        round: Its number on that channel, from 1.
        tokens: Tokens this rank dispatched; T below.

    """

    channel: int
    round: int
    tokens: int


class AllToAll:
    """Dispatch and combine between the ranks of a world. One thread per channel may use it at a time.

    With two channels, either give each a thread of its own, or call the halves of both in the same order on
    all ranks: a receive half does its share of other ranks' traffic, so ranks that wait on different channels
    wait for each other (docs/protocol_model.md).
    """

    def __init__(
        self, config: AllToAllConfig, bootstrap: Bootstrap, settings: Settings | None = None
    ) -> None:
        """Collective: agree with all ranks, allocate, connect.

        Args:
            config: Equal on all ranks.
            bootstrap: Connects the ranks until the fabric does.
            settings: Default: read from the environment.

        Raises:
            ConfigurationError: A value is out of bounds or ranks disagree; nothing was started.
            FabricUnavailableError: No usable libfabric or provider.

        """
        settings = settings if settings is not None else Settings.from_environment()
        self.config = config
        self._bootstrap = bootstrap
        self._settings = settings
        self._failure: EfaEpError | None = None
        self.world = join_world(bootstrap, _must_agree(config, settings), settings.ranks_per_node)
        config.check(self.world.size, self.world.ranks_per_node)
        placement = config.placement(self.world.size)
        self.local_experts = experts_of(placement, self.world.rank)
        layout = config.core_layout(self.world.size, self.world.ranks_per_node)
        self._plan = MemoryPlan.of(layout)
        timeout_s = settings.timeout_s * (1 - _DIAGNOSIS_SHARE)
        self._connection: Connection | None = connect(self.world, layout, bootstrap, settings, timeout_s)
        self._device: _core.CpuDevice | None = _core.CpuDevice(
            layout=layout,
            rank=self.world.rank,
            expert_owner=placement,
            combine_type=COMBINE_TYPES[config.combine_dtype],
            per_expert=config.layout == "per_expert",
            timeout_s=timeout_s,
            arenas=self._connection.arenas,
            proxy=self._connection.proxy,
            check_wait=self._connection.watch.check,
        )
        self._rounds = [0] * config.channels
        arena = self._connection.arena
        channels = range(config.channels)
        self._activations = [activations(arena, layout, channel, config) for channel in channels]
        self._results = [results(arena, layout, channel, config) for channel in channels]
        self._buffers = [
            OutputBuffers(config, len(self.local_experts), self.expert_capacity) for _ in self._rounds
        ]

    @property
    def rank(self) -> int:
        """This rank."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def num_local_experts(self) -> int:
        """Experts this rank owns."""
        return len(self.local_experts)

    @property
    def expert_capacity(self) -> int:
        """Rows per expert in the per_expert layout: every token of every rank."""
        return self.world.size * self.config.max_tokens_per_rank

    def activations(self, channel: int = 0) -> torch.Tensor:
        """Return memory that ranks of the own node read: a layer that writes its output here saves a copy.

        Returns:
            ``[max_tokens_per_rank, columns]`` of ``config.dtype``, not contiguous. Pass its first T rows to
            ``dispatch_send`` as ``x``; from then on they must stay untouched until ``combine_recv``.

        """
        self._check_channel(channel)
        return self._activations[channel]

    def expert_output(self, handle: Handle) -> torch.Tensor:
        """Return memory that other ranks read: experts that write their output here save a copy of every row.

        Returns:
            ``[M, H]`` of ``config.combine_dtype``, uninitialised, for the M rows of ``dispatch_recv``. Pass
            it to ``combine_send``; from then on it must stay untouched until the channel's next
            ``dispatch_recv``.

        Raises:
            ConfigurationError: The layout is per_expert: its outputs are summed, so they need another place.

        """
        self._check_handle(handle)
        if self.config.layout == "per_expert":
            raise ConfigurationError(
                "expert_output() is for layout per_token; in per_expert, experts use tensors of their own"
            )
        return self._results[handle.channel][: self._buffers[handle.channel].rows]

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        channel: int = 0,
    ) -> Handle:
        """Send tokens to the ranks of their experts; waits for nobody.

        The inputs may be reused at once, but for an ``x`` that is (the first rows of) ``activations()``.

        Args:
            x: ``[T, columns]`` of ``config.dtype``.
            topk_ids: int32 or int64 ``[T, K]`` global expert ids; -1 drops a slot.
            topk_weights: float32 ``[T, K]``.
            scales: float32 ``[T, S]`` if the configuration has scales.
            channel: Which channel the round uses.

        Raises:
            ConfigurationError: Too many tokens, an id out of range, a wrong shape or dtype; nothing was sent.

        """
        self._check_channel(channel)
        tokens = x.shape[0] if x.ndim > 0 else 0
        config = self.config
        check("x", x, (tokens, config.columns), (config.dtype,))
        if x.stride() != self._activations[channel].stride():  # rows elsewhere must lie side by side
            x = x.contiguous()
        topk_ids = checked("topk_ids", topk_ids, (tokens, config.top_k), (torch.int32, torch.int64))
        topk_weights = checked("topk_weights", topk_weights, (tokens, config.top_k), (torch.float32,))
        if (scales is not None) != (config.scale_columns > 0):
            raise ConfigurationError(
                f"scales are {'given' if scales is not None else 'missing'}, but scale_columns is "
                f"{config.scale_columns}; pass float32 scales [tokens, scale_columns] exactly if it is not 0"
            )
        if scales is not None:
            scales = checked("scales", scales, (tokens, config.scale_columns), (torch.float32,))
        self._call(
            lambda device: device.dispatch_send(
                channel,
                x.data_ptr(),
                x.stride(0) * x.itemsize,
                scales.data_ptr() if scales is not None else 0,
                topk_ids.data_ptr(),
                topk_ids.dtype == torch.int64,
                topk_weights.data_ptr(),
                tokens,
            )
        )
        self._rounds[channel] += 1
        return Handle(channel, self._rounds[channel], tokens)

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        """Wait for all rows for this rank's experts.

        Raises:
            RankLostError: A rank is gone; the message names it.
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        self._check_handle(handle)
        buffers = self._buffers[handle.channel]
        rows = self._call(
            lambda device: device.dispatch_recv(handle.channel, buffers.room, *buffers.addresses)
        )
        if rows > buffers.room:
            buffers.grow(rows)
            self._call(lambda device: device.dispatch_pack(handle.channel, *buffers.addresses))
        return buffers.views(rows)

    def combine_send(
        self, expert_output: torch.Tensor, handle: Handle, weights_applied: bool | None = None
    ) -> None:
        """Send results back; waits for nobody.

        ``expert_output`` may be reused at once, unless it is the round's ``expert_output()``, which is sent
        from where it is.

        Args:
            expert_output: ``config.combine_dtype``. per_token: ``[M, H]``, weighted and summed over this
                rank's experts, or ``[M, K, H]``, a row per slot (those of other ranks' experts are not read).
                per_expert: ``[local experts, capacity, H]``.
            handle: The round.
            weights_applied: Whether the router weights are in the rows already. Default: yes for ``[M, H]``,
                where it must be, no otherwise.

        """
        self._check_handle(handle)
        config = self.config
        rows = self._buffers[handle.channel].rows
        per_slot = config.layout == "per_token" and expert_output.ndim == 3
        shape: tuple[int, ...]
        if config.layout == "per_expert":
            shape = (self.num_local_experts, self.expert_capacity, config.hidden_size)
        else:
            shape = (rows, config.top_k, config.hidden_size) if per_slot else (rows, config.hidden_size)
        summed = len(shape) == 2
        if summed and weights_applied is False:
            raise ConfigurationError(
                "expert_output [M, H] is summed over experts, so combine cannot weight it any more; apply "
                "the weights in the experts, or pass [M, K, H]"
            )
        expert_output = checked("expert_output", expert_output, shape, (config.combine_dtype,))
        applied = summed if weights_applied is None else weights_applied
        self._call(
            lambda device: device.combine_send(handle.channel, expert_output.data_ptr(), per_slot, applied)
        )

    def combine_recv(self, handle: Handle, out: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for all results and write one row per dispatched token.

        Args:
            handle: The round.
            out: ``[T, H]`` of ``config.combine_dtype``, contiguous; default: a new tensor. Tokens without
                experts get zeros.

        Raises:
            RankLostError: A rank is gone; the message names it.
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        self._check_handle(handle)
        shape = (handle.tokens, self.config.hidden_size)
        if out is None:
            out = torch.empty(shape, dtype=self.config.combine_dtype)
        elif checked("out", out, shape, (self.config.combine_dtype,)) is not out:
            raise ConfigurationError(
                "out must be contiguous, since it is written in place; pass out.contiguous()"
            )
        address = out.data_ptr()
        self._call(lambda device: device.combine_recv(handle.channel, address))
        return out

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        channel: int = 0,
    ) -> tuple[Dispatched, Handle]:
        """Both halves of dispatch at once."""
        handle = self.dispatch_send(x, topk_ids, topk_weights, scales, channel)
        return self.dispatch_recv(handle), handle

    def combine(
        self,
        expert_output: torch.Tensor,
        handle: Handle,
        out: torch.Tensor | None = None,
        weights_applied: bool | None = None,
    ) -> torch.Tensor:
        """Both halves of combine at once."""
        self.combine_send(expert_output, handle, weights_applied)
        return self.combine_recv(handle, out)

    def memory_plan(self) -> MemoryPlan:
        """Return what this instance allocated."""
        return self._plan

    def stats(self) -> Stats:
        """Return the totals so far."""
        connection, device = self._alive()
        description = connection.description
        return Stats(
            rank=self.world.rank,
            world_size=self.world.size,
            nodes=self.world.nodes,
            provider=description.provider,
            fabric=description.fabric,
            library=description.library,
            nics=description.nics,
            huge_pages=connection.arena.huge_pages,
            half_seconds=device.half_seconds(),
            wait_seconds=device.wait_seconds(),
            half_buckets=device.half_buckets(),
            wait_buckets=device.wait_buckets(),
            waited_for_seconds=device.waited_for_seconds(),
            **device.counters(),
            **connection.counters(),
        )

    def close(self) -> None:
        """Collective, unless a failure came first: finish own writes, wait for the others, free all.

        A rank that is gone or silent is no error any more, since every round that returned is complete: it is
        logged as a warning.
        """
        if self._connection is None:
            return
        if self._failure is None:
            timeout_s, watch = self._settings.timeout_s, self._connection.watch
            try:
                self._connection.drain(timeout_s)
                wait_for_all(self._bootstrap, timeout_s, watch.check)
            except (RankLostError, RankTimeoutError, TransportError) as error:
                logger.warning("EFA EP: closed without the others: %s", watch.verdict() or error)
            watch.leave()
        self._device = None
        self._activations, self._results = [], []
        self._connection.close()
        self._connection = None

    def __enter__(self) -> "AllToAll":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error without waiting for the others."""
        if kind is not None and self._failure is None:
            self._failure = EfaEpError(f"closed after {kind.__name__}: {error}")
        self.close()

    def _alive(self) -> tuple[Connection, _core.CpuDevice]:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._connection is None or self._device is None:
            raise ConfigurationError("this AllToAll is closed; build a new one")
        return self._connection, self._device

    def _check_channel(self, channel: int) -> None:
        self._alive()
        if not 0 <= channel < self.config.channels:
            raise ConfigurationError(
                f"channel {channel} does not exist; use 0 to {self.config.channels - 1}, or set "
                "AllToAllConfig.channels"
            )

    def _check_handle(self, handle: Handle) -> None:
        self._check_channel(handle.channel)
        if handle.round != self._rounds[handle.channel]:
            raise ConfigurationError(
                f"the handle is of round {handle.round}, but channel {handle.channel} is in round "
                f"{self._rounds[handle.channel]}; use each handle until its combine_recv, then drop it"
            )

    def _call(self, half: "Callable[[_core.CpuDevice], _Result]") -> "_Result":
        """Run a half. Any failure but a refused argument ends this instance, with the rank at fault named."""
        device = self._alive()[1]
        try:
            return half(device)
        except ConfigurationError as refusal:
            failure: EfaEpError = refusal
        except EfaEpError as error:
            watch = self._alive()[0].watch
            grace_s = self._settings.timeout_s * _DIAGNOSIS_SHARE
            reason = explain(self._bootstrap, error, grace_s, watch.verdict)
            failure = self._failure = _with_reason(error, reason) if reason else error
            if isinstance(error, RankLostError | RankTimeoutError | TransportError):
                watch.leave()  # the others find the culprit themselves; this rank is not it
        except BaseException as interrupt:  # Ctrl-C or another signal's: the round stays unfinished
            notes = "; ".join(getattr(interrupt, "__notes__", ()))
            self._failure = EfaEpError(f"interrupted by {type(interrupt).__name__}: {notes}")
            raise
        # Raised without its frames: they refer to the device, whose memory must go at close() even if the
        # caller keeps the error.
        del device
        raise failure.with_traceback(None)


_Result = TypeVar("_Result")


def _must_agree(config: AllToAllConfig, settings: Settings) -> dict[str, object]:
    wanted = {name: str(value) for name, value in asdict(config).items()}
    return {
        **wanted,
        "EFA_EP_CHUNK_BYTES": settings.chunk_bytes,
        "EFA_EP_RANKS_PER_NODE": settings.ranks_per_node,
        "vllm_efa_ep version": __version__,
    }


def _with_reason(error: EfaEpError, reason: str) -> EfaEpError:
    message = f"{error}. {reason}"
    if isinstance(error, RankTimeoutError):
        return RankTimeoutError(message, error.half, error.round, error.missing)
    if isinstance(error, TransportError):
        return TransportError(message, error.peer)
    return error
