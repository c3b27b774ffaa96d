"""The public API: dispatch tokens to the ranks of their experts, and combine the results.

A round on a channel is ``dispatch_send``, ``dispatch_recv``, ``combine_send``, ``combine_recv``. The send
halves return at once, so the caller can compute between the halves while data flies::

    a2a = AllToAll(AllToAllConfig(...), TorchBootstrap(group))
    handle = a2a.dispatch_send(x, topk_ids, topk_weights)
    dispatched = a2a.dispatch_recv(handle)
    a2a.combine_send(experts(dispatched.x, ...), handle)
    out = a2a.combine_recv(handle)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Literal, TypeVar

import torch

from vllm_efa_ep import __version__, _core
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.connection import Connection, connect
from vllm_efa_ep.diagnosis import explain
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, RankTimeoutError, TransportError
from vllm_efa_ep.memory_plan import MemoryPlan
from vllm_efa_ep.placement import experts_of, linear_placement
from vllm_efa_ep.stats import Stats
from vllm_efa_ep.world import join_world

Layout = Literal["per_token", "per_expert"]

_COMBINE_TYPES = {
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
_ROW_ALIGNMENT = 16
# Part of the deadline kept for finding out which rank is at fault.
_DIAGNOSIS_SHARE = 0.1


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
        layout: ``per_token``: received rows ``[M, H]``. ``per_expert``: ``[experts, capacity, H]``.
        channels: Rounds that can be in flight at once, 1 or 2.
        expert_to_rank: Owner rank of every expert; None places them linearly.

    """

    hidden_size: int
    num_experts: int
    top_k: int
    max_tokens_per_rank: int
    dtype: torch.dtype = torch.bfloat16
    combine_dtype: torch.dtype = torch.bfloat16
    payload_columns: int | None = None
    scale_columns: int = 0
    layout: Layout = "per_token"
    channels: int = 1
    expert_to_rank: tuple[int, ...] | None = None

    @property
    def columns(self) -> int:
        """Elements of one dispatched activation."""
        return self.hidden_size if self.payload_columns is None else self.payload_columns

    def placement(self, world_size: int) -> tuple[int, ...]:
        """Return the owner of every expert."""
        if self.expert_to_rank is not None:
            return tuple(self.expert_to_rank)
        return linear_placement(self.num_experts, world_size)

    def memory_plan(self, world_size: int, ranks_per_node: int) -> MemoryPlan:
        """Return the memory one rank of such a world takes, without allocating any."""
        self.check(world_size)
        if ranks_per_node < 1 or world_size % ranks_per_node:
            raise ConfigurationError(f"{world_size} ranks do not divide into nodes of {ranks_per_node}")
        return MemoryPlan.of(self.core_layout(world_size, ranks_per_node))

    def core_layout(self, world_size: int, ranks_per_node: int) -> _core.Layout:
        """Return the arena's layout."""
        return _core.Layout(
            world=world_size,
            ranks_per_node=ranks_per_node,
            top_k=self.top_k,
            payload_bytes=self.columns * self.dtype.itemsize,
            scale_bytes=4 * self.scale_columns,
            combine_bytes=self.hidden_size * self.combine_dtype.itemsize,
            max_tokens=self.max_tokens_per_rank,
            channels=self.channels,
        )

    def check(self, world_size: int) -> None:
        """Raise ``ConfigurationError`` for the first value outside the protocol's bounds."""
        limits = _core.limits()
        _check_range("world size", world_size, 1, limits["ranks"])
        _check_range("num_experts", self.num_experts, 1, limits["experts"])
        _check_range("top_k", self.top_k, 1, limits["top_k"])
        _check_range("max_tokens_per_rank", self.max_tokens_per_rank, 1, limits["tokens_per_rank"])
        _check_range("channels", self.channels, 1, limits["channels"])
        _check_range("hidden_size", self.hidden_size, 1, 2**20)
        _check_range("payload_columns", self.columns, 1, 2**20)
        _check_range("scale_columns", self.scale_columns, 0, 2**16)
        _check_choice("layout", self.layout, ("per_token", "per_expert"))
        _check_choice("dtype", self.dtype, _PAYLOAD_TYPES)
        _check_choice("combine_dtype", self.combine_dtype, tuple(_COMBINE_TYPES))
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


@dataclass(frozen=True)
class Handle:
    """A round in flight: returned by ``dispatch_send``, taken by the other halves.

    Attributes:
        channel: The channel it runs on.
        round: Its number on that channel, from 1.
        tokens: Tokens this rank dispatched; T below.

    """

    channel: int
    round: int
    tokens: int


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts, in (source rank, token) order.

    The tensors are views of the channel's buffers: valid until the next ``dispatch_recv`` on the channel.

    Attributes:
        x: ``[M, columns]``, or ``[local experts, capacity, columns]`` in the per_expert layout.
        scales: float32, like ``x`` with S columns; None without scales.
        topk_ids: int32 ``[M, K]``, the global ids the token was routed to (experts of other ranks included);
            None in the per_expert layout.
        topk_weights: float32 ``[M, K]``; None in the per_expert layout.
        tokens_per_expert: int32 ``[local experts]``.

    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor


class AllToAll:
    """Dispatch and combine between the ranks of a world. One thread per channel may use it at a time."""

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
        config.check(self.world.size)
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
            combine_type=_COMBINE_TYPES[config.combine_dtype],
            per_expert=config.layout == "per_expert",
            timeout_s=timeout_s,
            arenas=self._connection.arenas,
            proxy=self._connection.proxy,
        )
        self._rounds = [0] * config.channels
        self._buffers = [
            _OutputBuffers(config, len(self.local_experts), self.expert_capacity) for _ in self._rounds
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

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        channel: int = 0,
    ) -> Handle:
        """Send tokens to the ranks of their experts; waits for nobody. The inputs may be reused at once.

        Args:
            x: ``[T, columns]`` of ``config.dtype``.
            topk_ids: int32 or int64 ``[T, K]`` global expert ids; -1 drops a slot.
            topk_weights: float32 ``[T, K]``.
            scales: float32 ``[T, S]`` if the configuration has scales.
            channel: Which channel the round uses.

        Raises:
            ConfigurationError: Too many tokens, an id out of range, a wrong shape or dtype; nothing was sent.

        """
        tokens = x.shape[0]
        config = self.config
        x = _checked("x", x, (tokens, config.columns), (config.dtype,))
        topk_ids = _checked("topk_ids", topk_ids, (tokens, config.top_k), (torch.int32, torch.int64))
        topk_weights = _checked("topk_weights", topk_weights, (tokens, config.top_k), (torch.float32,))
        if (scales is not None) != (config.scale_columns > 0):
            raise ConfigurationError(
                f"scales are {'given' if scales is not None else 'missing'}, but scale_columns is "
                f"{config.scale_columns}; pass float32 scales [tokens, scale_columns] exactly if it is not 0"
            )
        if scales is not None:
            scales = _checked("scales", scales, (tokens, config.scale_columns), (torch.float32,))
        self._call(
            lambda device: device.dispatch_send(
                channel,
                x.data_ptr(),
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
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        self._check_handle(handle)
        rows = self._call(lambda device: device.dispatch_wait(handle.channel))
        dispatched = self._buffers[handle.channel].views(rows)
        self._call(
            lambda device: device.dispatch_pack(
                handle.channel,
                dispatched.x.data_ptr(),
                _pointer(dispatched.scales),
                _pointer(dispatched.topk_ids),
                _pointer(dispatched.topk_weights),
                dispatched.tokens_per_expert.data_ptr(),
            )
        )
        return dispatched

    def combine_send(
        self, expert_output: torch.Tensor, handle: Handle, weights_applied: bool | None = None
    ) -> None:
        """Send results back; waits for nobody. ``expert_output`` may be reused at once.

        Args:
            expert_output: ``config.combine_dtype``. per_token: ``[M, H]``, weighted and summed over this
                rank's experts, or ``[M, K, H]``, one row per slot (those of other ranks' experts are not read).
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
        expert_output = _checked("expert_output", expert_output, shape, (config.combine_dtype,))
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
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        self._check_handle(handle)
        shape = (handle.tokens, self.config.hidden_size)
        if out is None:
            out = torch.empty(shape, dtype=self.config.combine_dtype)
        elif _checked("out", out, shape, (self.config.combine_dtype,)) is not out:
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
            **device.counters(),
            **connection.counters(),
        )

    def close(self) -> None:
        """Collective, unless a failure came first: finish own writes, wait for the others, free all."""
        if self._connection is None:
            return
        if self._failure is None:
            self._connection.drain(self._settings.timeout_s)
            _wait_for_all(self._bootstrap, "closed", self._settings.timeout_s)
        self._device = None
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
            raise self._failure
        if self._connection is None or self._device is None:
            raise ConfigurationError("this AllToAll is closed; build a new one")
        return self._connection, self._device

    def _check_handle(self, handle: Handle) -> None:
        if handle.round != self._rounds[handle.channel]:
            raise ConfigurationError(
                f"the handle is of round {handle.round}, but channel {handle.channel} is in round "
                f"{self._rounds[handle.channel]}; use each handle until its combine_recv, then drop it"
            )

    def _call(self, half: "Callable[[_core.CpuDevice], _Result]") -> "_Result":
        """Run a half. Any failure but a refused argument ends this instance, with the rank at fault named."""
        _, device = self._alive()
        with self._failing():
            return half(device)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except ConfigurationError:
            raise
        except EfaEpError as error:
            grace_s = self._settings.timeout_s * _DIAGNOSIS_SHARE
            reason = explain(self._bootstrap, error, grace_s)
            self._failure = _with_reason(error, reason) if reason else error
            raise self._failure from None


_Result = TypeVar("_Result")


class _OutputBuffers:
    """A channel's received rows. Kept from round to round: fresh memory would cost more than the copies."""

    def __init__(self, config: AllToAllConfig, local_experts: int, capacity: int) -> None:
        self._config = config
        self._capacity = capacity
        self._tokens_per_expert = torch.zeros(local_experts, dtype=torch.int32)
        self.rows = 0  # of the round in flight
        self._room = 0
        per_expert = config.layout == "per_expert"
        shape = (local_experts, capacity) if per_expert else (0,)
        self._whole = self._allocate(shape, with_routing=not per_expert)

    def views(self, rows: int) -> Dispatched:
        """Return buffers for ``rows`` rows."""
        self.rows = rows
        if self._config.layout == "per_expert":
            return self._whole
        if rows > self._room:
            self._room = min(self._capacity, max(rows, 2 * self._room))
            self._whole = self._allocate((self._room,), with_routing=True)
        whole = self._whole
        return Dispatched(
            whole.x[:rows],
            None if whole.scales is None else whole.scales[:rows],
            None if whole.topk_ids is None else whole.topk_ids[:rows],
            None if whole.topk_weights is None else whole.topk_weights[:rows],
            self._tokens_per_expert,
        )

    def _allocate(self, shape: tuple[int, ...], with_routing: bool) -> Dispatched:
        config = self._config
        return Dispatched(
            torch.empty((*shape, config.columns), dtype=config.dtype),
            torch.empty((*shape, config.scale_columns), dtype=torch.float32)
            if config.scale_columns
            else None,
            torch.empty((*shape, config.top_k), dtype=torch.int32) if with_routing else None,
            torch.empty((*shape, config.top_k), dtype=torch.float32) if with_routing else None,
            self._tokens_per_expert,
        )


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


def _wait_for_all(bootstrap: Bootstrap, event: str, timeout_s: float) -> None:
    """Wait until every rank has come here, so that nobody takes its memory away while others still write."""
    deadline = time.monotonic() + timeout_s
    try:
        bootstrap.publish(f"{event}/{bootstrap.rank}", "1")
        for rank in range(bootstrap.world_size):
            while bootstrap.lookup(f"{event}/{rank}") is None and time.monotonic() < deadline:
                time.sleep(0.001)
    except EfaEpError:
        # The process that hosts the bootstrap has left already, so it passed this point.
        return


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _checked(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> torch.Tensor:
    """Return the tensor, contiguous, or raise ``ConfigurationError`` if shape, dtype or device are wrong."""
    if tensor.device.type != "cpu":
        raise ConfigurationError(
            f"{name} is on {tensor.device}, but this instance runs on cpu; move it with .cpu()"
        )
    if tensor.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ConfigurationError(f"{name} has dtype {tensor.dtype}; convert it to {accepted}")
    if tuple(tensor.shape) != shape:
        raise ConfigurationError(f"{name} has shape {list(tensor.shape)}; pass {list(shape)}")
    return tensor.contiguous()


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name} is {value}; use {low} to {high}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; use one of {', '.join(map(str, choices))}")
