"""One generation of a world: everything that is built for an agreed set of ranks, and given up at a loss.

Nothing of a generation outlives it: the next one has new memory with new keys, new endpoints and new
connections. Hence whatever a rank of an older generation still writes, it writes where nobody reads.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all_config import COMBINE_TYPES, QUANTISATIONS, AllToAllConfig
from vllm_efa_ep.arena_views import activations, results
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.generation import GenerationBootstrap
from vllm_efa_ep.closing import wait_for_all
from vllm_efa_ep.config import Settings
from vllm_efa_ep.connection import Connection, connect
from vllm_efa_ep.diagnosis import explain
from vllm_efa_ep.dispatch_input import dispatch_glance
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    RankLostError,
    RankTimeoutError,
    TransportError,
)
from vllm_efa_ep.membership import Membership
from vllm_efa_ep.nvtx import with_ranges
from vllm_efa_ep.rank_memory import Halves, RankMemory, memory_for, resolve_device
from vllm_efa_ep.stand_in import StandIn, servers
from vllm_efa_ep.stats import Totals
from vllm_efa_ep.trace.files import write_trace
from vllm_efa_ep.watch import Watch
from vllm_efa_ep.world import World, join_world

if TYPE_CHECKING:
    from vllm_efa_ep.cuda.kept_memory import KeptMemory

# Part of the deadline kept for finding out which rank is at fault.
_DIAGNOSIS_SHARE = 0.1

_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


class Generation:
    """This rank's part of one generation: its position, and those it stands in for."""

    def __init__(
        self,
        config: AllToAllConfig,
        bootstrap: Bootstrap,
        settings: Settings,
        membership: Membership,
        position: tuple[World, Connection],
        stand_ins: list[tuple[World, Connection]],
    ) -> None:
        """Take over connected positions."""
        self.membership = membership
        self.world, self.connection = position
        self.failure: EfaEpError | None = None
        self.rounds = [0] * config.channels
        self._bootstrap = bootstrap
        self._settings = settings
        owners = config.placement(self.world.size)
        owners = tuple(owner if owner in membership.members else _core.NO_OWNER for owner in owners)
        self.stand_ins = [
            StandIn(
                world,
                connection,
                connection.memory.make_stand_in(
                    _device_arguments(config, settings, owners, world, connection), self.connection.memory
                ),
            )
            for world, connection in stand_ins
        ]
        # Without a reference to this instance, which would keep itself alive through the device.
        self._check_wait = partial(_check_wait, self.stand_ins, self.connection.watch)
        halves = self.connection.memory.make_halves(
            _device_arguments(config, settings, owners, *position), self._check_wait
        )
        self._device: Halves | None = with_ranges(halves) if settings.nvtx == "on" else halves
        layout = config.core_layout(self.world.size, self.world.ranks_per_node)
        channels = range(config.channels)
        #: By channel; none if rows are quantised on their way.
        self.activations = [
            activations(self.connection, layout, channel, config)
            for channel in channels
            if config.quantisation == "none"
        ]
        #: By channel: what reads the tensors of dispatch_send.
        self.glances = [
            dispatch_glance(
                config, self.connection.memory.device, self.activations[channel] if self.activations else None
            )
            for channel in channels
        ]
        self.results = [results(self.connection, layout, channel, config) for channel in channels]
        self.connection.watch.end_waits_by(self._end_waits)

    def start_round(self, channel: int) -> int:
        """Count a round that this rank has begun, let its stand-ins begin it, and return its number."""
        for stand_in in self.stand_ins:
            stand_in.start_round(channel)
        self.rounds[channel] += 1
        return self.rounds[channel]

    def call(self, half: Callable[[Halves], _Result]) -> _Result:
        """Run a half. Any failure but a refused argument ends this generation; the rank at fault is named."""
        device = self._device if self._device is not None else self._open_device()
        try:
            return half(device)
        except ConfigurationError as refusal:
            failure: EfaEpError = refusal
        except EfaEpError as error:
            failure = self.failure = self._explained(error)
            if isinstance(error, RankLostError | RankTimeoutError | TransportError):
                self.connection.watch.leave()  # the others find the culprit themselves; this rank is not it
        except BaseException as interrupt:  # Ctrl-C or another signal's: the round stays unfinished
            notes = "; ".join(getattr(interrupt, "__notes__", ()))
            self.failure = EfaEpError(f"interrupted by {type(interrupt).__name__}: {notes}")
            raise
        # Raised without its frames: they refer to the device, whose memory must go at close() even if the
        # caller keeps the error.
        del device
        raise failure.with_traceback(None)

    def fault(self) -> torch.Tensor:
        """Return a bool where the tensors are, in the current stream's order: whether a half has failed."""
        memory = self.connection.memory
        word = memory.fault_word()
        if self.failure is not None or word is None:
            return torch.tensor(self.failure is not None, device=memory.device)
        return (word != 0).any()

    def raise_fault(self) -> None:
        """Raise the failure of a half, which in a replayed CUDA graph had no call to raise it."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        self.call(lambda _: self.connection.memory.raise_fault())

    def totals(self) -> Totals:
        """Return what this rank's own position has done."""
        device = self._open_device()
        counters = {**device.counters(), **self.connection.counters()}
        return Totals(
            counters,
            device.half_seconds(),
            device.wait_seconds(),
            device.half_buckets(),
            device.wait_buckets(),
            device.waited_for_seconds(),
        )

    def drain(self) -> None:
        """Wait until all own writes are complete; a failure ends this generation, as a half's does."""
        self.call(lambda _: self.connection.drain(self._settings.timeout_s, self._check_wait))

    def finish(self) -> None:
        """Collective: finish own writes and wait for the others.

        Raises:
            RankLostError: A rank is gone; every round that returned is complete all the same.
            RankTimeoutError: A rank did not come in time.
            TransportError: The network failed.

        """
        timeout_s, check = self._settings.timeout_s, self._check_wait
        for stand_in in self.stand_ins:
            stand_in.finish(timeout_s, check)
        self.connection.drain(timeout_s, check)
        wait_for_all(self._bootstrap, self.membership.members, timeout_s, check)

    def close(self) -> None:
        """Free everything, without waiting for anybody; safe to repeat."""
        try:
            self._write_trace()
        finally:
            self.connection.watch.close()  # its thread may end waits, in memory that goes now
            self._device = None
            self.activations, self.results, self.glances = [], [], []
            # All of them first: on a GPU, to wait for one is to wait for all.
            self.connection.memory.stop()
            for stand_in in self.stand_ins:
                stand_in.stop()
            while self.stand_ins:
                self.stand_ins.pop().close()
            self.connection.close()

    def _write_trace(self) -> None:
        directory, proxy = self._settings.trace, self.connection.proxy
        if directory and self._device is not None:
            delays_ns, generation = self.connection.least_delays_ns, self.membership.generation
            try:
                write_trace(directory, self.world, generation, delays_ns, self._device, proxy)
            except OSError as error:
                # Not the error itself: its frames refer to the device, and a handler may keep what it logs.
                logger.warning("EFA EP: rank %d leaves no trace: %s", self.world.rank, str(error))

    def _open_device(self) -> Halves:
        if self._device is None:
            raise ConfigurationError("this AllToAll is closed; build a new one")
        return self._device

    def _end_waits(self) -> None:
        self.connection.memory.end_waits()
        for stand_in in self.stand_ins:
            stand_in.end_waits()

    def _explained(self, error: EfaEpError) -> EfaEpError:
        grace_s = self._settings.timeout_s * _DIAGNOSIS_SHARE
        watch = self.connection.watch
        if isinstance(error, RankTimeoutError):  # a kernel knows that its wait was ended, but not why
            loss = watch.loss(error.half, error.round, str(error))
            if loss is not None:
                return loss
        reason = explain(
            self._bootstrap, error, grace_s, watch.verdict, lambda: watch.called_off, self.world.server_of
        )
        return _with_reason(error, reason) if reason else error


def _check_wait(stand_ins: list[StandIn], watch: Watch, half: str, round: int, wait: str) -> None:
    for stand_in in stand_ins:
        stand_in.raise_failure()
    watch.check(half, round, wait)


def first_generation(
    config: AllToAllConfig,
    bootstrap: Bootstrap,
    settings: Settings,
    must_agree: Mapping[str, Any],
    kept: "KeptMemory | None",
) -> Generation:
    """Collective: start a world in which every rank is alive."""
    memory = memory_for(resolve_device(config.device), settings, kept)
    position = _take_position(config, bootstrap, settings, must_agree, None, memory)
    membership = Membership.first(bootstrap.world_size, position[0].ranks_per_node)
    return _start(config, bootstrap, settings, membership, [position])


def build_generation(
    config: AllToAllConfig,
    bootstrap: Bootstrap,
    settings: Settings,
    must_agree: Mapping[str, Any],
    membership: Membership,
    kept: "KeptMemory | None",
) -> Generation:
    """Collective between the members: connect all positions anew, the lost ones with stand-ins.

    Every position is connected as at the start, each in a thread of its own.
    """
    settings = replace(settings, ranks_per_node=membership.ranks_per_node)
    # One mask per generation, unless somebody destroys it in a store that strangers reach.
    must_agree = {**must_agree, "the live ranks": list(membership.members)}
    server_of = servers(bootstrap.world_size, membership.ranks_per_node, membership.members)
    own = [rank for rank, server in enumerate(server_of) if server == bootstrap.rank]
    own.sort(key=lambda rank: rank != bootstrap.rank)  # this rank's own position first
    timeout_s = settings.timeout_s
    keys = [GenerationBootstrap(bootstrap, membership.generation, rank, timeout_s) for rank in own]

    def take(each: GenerationBootstrap, memory: RankMemory) -> tuple[World, Connection]:
        try:
            return _take_position(config, each, settings, must_agree, server_of, memory)
        except Exception as error:
            with suppress(EfaEpError):
                each.give_up(f"{type(error).__name__}: {error}")
            raise

    with ThreadPoolExecutor(len(own), "efa_ep_position") as threads:
        # Their memory is chosen here: torch's current GPU is this thread's.
        device = resolve_device(config.device)
        memories = [memory_for(device, settings, kept if number == 0 else None) for number in range(len(own))]
        futures = [threads.submit(take, *each) for each in zip(keys, memories, strict=True)]
    errors = list(filter(None, (future.exception() for future in futures)))
    if errors:
        for future in futures:
            if future.exception() is None:
                future.result()[1].close()
        for error in errors:
            _forget_frames(error)
        raise errors[0]
    positions = [future.result() for future in futures]
    return _start(config, keys[0], settings, membership, positions)


def _start(
    config: AllToAllConfig,
    bootstrap: Bootstrap,
    settings: Settings,
    membership: Membership,
    positions: list[tuple[World, Connection]],
) -> Generation:
    """Build on connected positions; if that fails, close them, which the other ranks notice at once."""
    with ExitStack() as on_error:
        for _, connection in positions:
            on_error.callback(connection.close)
        # Before that: frames of the error refer to the device, which uses what is closed.
        on_error.push(lambda _kind, _error, trace: clear_frames(trace))
        generation = Generation(config, bootstrap, settings, membership, positions[0], positions[1:])
        on_error.pop_all()
    return generation


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error refer to: memory that must be free before the next try."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _take_position(
    config: AllToAllConfig,
    bootstrap: Bootstrap,
    settings: Settings,
    must_agree: Mapping[str, Any],
    server_of: tuple[int, ...] | None,
    memory: RankMemory,
) -> tuple[World, Connection]:
    on_fabric = settings.gpu_handles == "fabric" and resolve_device(config.device) == "cuda"
    world = join_world(bootstrap, must_agree, settings.ranks_per_node, server_of, on_fabric)
    config.check(world.size, world.ranks_per_node)
    layout = config.core_layout(world.size, world.ranks_per_node)
    return world, connect(world, layout, bootstrap, settings, _wait_seconds(settings), memory)


def _device_arguments(
    config: AllToAllConfig,
    settings: Settings,
    owners: tuple[int, ...],
    world: World,
    connection: Connection,
) -> dict[str, Any]:
    return {
        "layout": config.core_layout(world.size, world.ranks_per_node),
        "rank": world.rank,
        "expert_owner": owners,
        "combine_type": COMBINE_TYPES[config.combine_dtype],
        "per_expert": config.layout == "per_expert",
        "quantisation": QUANTISATIONS[config.quantisation],
        "timeout_s": _wait_seconds(settings),
        "arenas": connection.arenas,
        "proxy": connection.proxy,
    }


def _wait_seconds(settings: Settings) -> float:
    return settings.timeout_s * (1 - _DIAGNOSIS_SHARE)


def _with_reason(error: EfaEpError, reason: str) -> EfaEpError:
    message = f"{error}. {reason}"
    if isinstance(error, RankTimeoutError):
        return RankTimeoutError(message, error.half, error.round, error.missing)
    if isinstance(error, TransportError):
        return TransportError(message, error.peer)
    return error
