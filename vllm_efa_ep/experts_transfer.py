"""Move expert weights between ranks: to rebalance, and to give the experts of a lost rank a new host.

A rank offers its weights once; afterwards others read them without its help, over NIXL: libfabric on EFA, UCX
elsewhere. A rebalancing of one layer, on every rank::

    transfer = ExpertTransfer(bootstrap)
    transfer.offer({"layer 3": {"w13": w13, "w2": w2}})  # [slots, ...] each
    moves = plan_moves(old_map, new_map, bootstrap.world_size)[bootstrap.rank]
    transfer.pull_together("layer 3", moves, staging)  # collective; staging: like what is offered
    for move in moves:  # all ranks have read, so weights may change
        w13[move.slot], w2[move.slot] = staging["w13"][move.slot], staging["w2"][move.slot]

**A source that changes during a transfer is not noticed**: reads are one-sided, so what arrives then is a
mixture of old and new bytes. Nobody may write to offered weights while another rank pulls; ``pull_together``
is there to know when that is over.
"""

import base64
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    ExpertTransferError,
    FabricUnavailableError,
    RankTimeoutError,
)
from vllm_efa_ep.experts_plan import Move
from vllm_efa_ep.nixl_agent import NixlAgent, Read, Region, wait_until
from vllm_efa_ep.weight_slots import WeightSlots, check_move

logger = logging.getLogger(__name__)

_SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Pulled:
    """What a pull moved.

    Attributes:
        bytes: From other ranks.
        seconds: From the first request to the last byte.

    """

    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Offer:
    """What another rank has published: its agent, and where its weights lie by layer and name."""

    agent: str
    layers: dict[str, dict[str, WeightSlots]]


@dataclass
class _Request:
    """The experts that come from one source, as one transfer."""

    source: int
    moves: Sequence[Move]
    bytes: int
    read: Read

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts, in the order of their slots."""
        return tuple(move.expert for move in self.moves)


class ExpertTransfer:
    """One rank's end: offers its experts' weights, and pulls others'. One thread may use it at a time."""

    def __init__(self, bootstrap: Bootstrap, settings: Settings | None = None) -> None:
        """Start NIXL; not collective.

        Args:
            bootstrap: Tells ranks where each other's weights are.
            settings: Default: read from the environment.

        Raises:
            FabricUnavailableError: NIXL is not installed, or has no usable plug-in.

        """
        settings = settings if settings is not None else Settings.from_environment()
        self._bootstrap = bootstrap
        self._timeout_s = settings.timeout_s
        # A rank that was restarted is another agent to the others.
        self._agent = NixlAgent(
            f"efa_ep/{bootstrap.rank}/{secrets.token_hex(4)}", settings.nixl_backend, settings.timeout_s
        )
        self._offered: dict[str, dict[str, WeightSlots]] = {}
        self._weights: dict[str, dict[str, torch.Tensor]] = {}
        self._registered: set[Region] = set()
        self._met: dict[int, tuple[str, _Offer]] = {}

    @property
    def backend(self) -> str:
        """The NIXL plug-in in use."""
        return self._agent.backend

    def offer(self, layers: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Let the other ranks read weights, beside what was offered before; not collective.

        Args:
            layers: By the name of the layer, the same on all ranks, and of the weight (such as w13, w2 and
                their scales): a tensor of ``[slots, ...]``, on the CPU or on one GPU. It must stay where it
                is until ``close``.

        Raises:
            ConfigurationError: A slot of a tensor is not one run of bytes, or the network cannot reach it; or
                this instance is closed.
            EfaEpError: The bootstrap is gone.

        """
        for layer, weights in layers.items():
            self._offered[layer] = {name: self._reach(name, tensor) for name, tensor in weights.items()}
            self._weights[layer] = dict(weights)
        described = {
            layer: {name: slots.to_json() for name, slots in offered.items()}
            for layer, offered in self._offered.items()
        }
        agent = base64.b64encode(self._agent.metadata()).decode()
        self._bootstrap.publish(_key(self._bootstrap.rank), json.dumps({"agent": agent, "layers": described}))

    def pull(
        self,
        layer: str,
        moves: Sequence[Move],
        into: Mapping[str, torch.Tensor],
        timeout_s: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Pulled:
        """Fetch experts; the ranks they come from need not take part.

        Each source serves all its experts in one transfer. Experts that this rank has itself are copied.

        Args:
            layer: The layer's name.
            moves: From where to where, of this rank (``plan_moves``).
            into: Tensors of ``[slots, ...]`` by the names that were offered. They may not be the offered ones
                as long as any rank pulls from here. They stay registered until ``close``: use the same ones
                again.
            timeout_s: Default: ``EFA_EP_TIMEOUT_S``.
            progress: Called with the bytes that are here and the bytes of all moves, when a source is done.

        Raises:
            ConfigurationError: Names, shapes, types or slots do not fit those of a source; or this instance
                is closed.
            ExpertTransferError: A source is dead or refuses; the message names it and the experts.
            FabricUnavailableError: A call into NIXL is stuck since an earlier failure: build a new instance.
            RankTimeoutError: A source has not offered the layer, or its bytes are not here, in time.

        """
        self._agent.require_alive()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        started = time.monotonic()
        deadline = started + timeout_s
        targets = {name: self._reach(name, tensor) for name, tensor in into.items()}
        by_source: dict[int, list[Move]] = {}
        for move in moves:
            by_source.setdefault(move.source, []).append(move)
        for move in by_source.pop(self._bootstrap.rank, []):
            check_move(self._offered.get(layer, {}), layer, move, targets)
            for name, tensor in into.items():
                tensor[move.slot].copy_(self._weights[layer][name][move.source_slot])
        offers = {
            source: self._offer_of(source, layer, of_source, targets, deadline, timeout_s)
            for source, of_source in by_source.items()
        }
        requests: list[_Request] = []
        try:
            for source, of_source in by_source.items():
                requests.append(self._request(offers[source], layer, of_source, targets, deadline))
            _wait(requests, deadline, timeout_s, progress)
        finally:
            for request in requests:
                request.read.release()
        return Pulled(sum(request.bytes for request in requests), time.monotonic() - started)

    def pull_together(
        self,
        layer: str,
        moves: Sequence[Move],
        into: Mapping[str, torch.Tensor],
        timeout_s: float | None = None,
        survivors: Sequence[int] | None = None,
        step: str = "",
    ) -> Pulled:
        """Collective ``pull``: once it returns, every rank has its experts, and offered weights may change.

        Args:
            layer: As for ``pull``.
            moves: As for ``pull``.
            into: As for ``pull``.
            timeout_s: As for ``pull``.
            survivors: After a loss, the ranks that take part (``AllToAll.active_ranks()``).
            step: With survivors, a name for this exchange: the same on all of them and never used before,
                such as the generation and the layer.

        Raises:
            ConfigurationError: Survivors without a step.
            ExpertTransferError: Another rank could not get its experts; no offered weight may change.
            EfaEpError: What ``pull`` raises, and the bootstrap's own errors.

        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if survivors is not None and not step:
            raise ConfigurationError(
                "survivors tell each other the outcome by keys, and those of an earlier exchange are still "
                "there; pass a step that was never used before, such as the generation and the layer"
            )

        def tell(outcome: str) -> dict[int, str]:
            if survivors is None:
                told = self._bootstrap.all_gather(outcome.encode())
                return {rank: each.decode() for rank, each in enumerate(told)}
            return self._tell_survivors(outcome, survivors, step, timeout_s)

        try:
            pulled = self.pull(layer, moves, into, timeout_s)
        except EfaEpError as error:  # the others must not wait for this rank
            tell(str(error))
            raise
        for rank, refusal in tell("").items():
            if refusal:
                raise ExpertTransferError(f"rank {rank} could not get its experts: {refusal}", rank)
        return pulled

    def close(self) -> None:
        """Offer nothing any more; safe to repeat. Whoever still pulls from here gets an error."""
        self._agent.close()

    def __enter__(self) -> "ExpertTransfer":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _tell_survivors(
        self, outcome: str, survivors: Sequence[int], step: str, timeout_s: float
    ) -> dict[int, str]:
        """Exchange outcomes by keys: the bootstrap's collectives wait for lost ranks, too."""
        self._bootstrap.publish(f"experts/pulled/{step}/{self._bootstrap.rank}", outcome)
        deadline = time.monotonic() + timeout_s
        told: dict[int, str] = {}

        def heard(rank: int) -> bool:
            answer = self._bootstrap.lookup(f"experts/pulled/{step}/{rank}")
            if answer is not None:
                told[rank] = answer
            return answer is not None

        for rank in survivors:
            if not wait_until(partial(heard, rank), deadline):
                raise RankTimeoutError(
                    f"rank {rank} did not say within {timeout_s:g} s whether it has its experts",
                    "pull_experts",
                    missing=(rank,),
                )
        return told

    def _reach(self, name: str, tensor: torch.Tensor) -> WeightSlots:
        slots = WeightSlots.of(name, tensor)
        region = slots.region
        if region not in self._registered and region.size > 0:
            self._agent.register(region, slots.kind, tensor)
            self._registered.add(region)
        return slots

    def _offer_of(
        self,
        source: int,
        layer: str,
        moves: Sequence[Move],
        targets: Mapping[str, WeightSlots],
        deadline: float,
        timeout_s: float,
    ) -> _Offer:
        """Look a source's offer up, and check that it has what the moves want."""
        if not 0 <= source < self._bootstrap.world_size:
            raise ConfigurationError(
                f"expert {moves[0].expert} is to come from rank {source}, but ranks are 0 to "
                f"{self._bootstrap.world_size - 1}"
            )
        with _blaming(source, moves):
            offered = wait_until(lambda: layer in self._known(source, deadline), deadline)
        if not offered:
            experts = ", ".join(str(move.expert) for move in moves)
            raise RankTimeoutError(
                f"rank {source} has not offered {layer} within {timeout_s:g} s, from which expert {experts} "
                "should come",
                "pull_experts",
                missing=(source,),
            )
        offer = self._met[source][1]
        for move in moves:
            check_move(offer.layers[layer], layer, move, targets)
        return offer

    def _known(self, source: int, deadline: float) -> dict[str, dict[str, WeightSlots]]:
        """Return the layers of a source, as it published them last."""
        published = self._bootstrap.lookup(_key(source))
        if published is None:
            return {}
        if source not in self._met or self._met[source][0] != published:
            told = json.loads(published)
            layers = {
                layer: {name: WeightSlots.from_json(each) for name, each in tensors.items()}
                for layer, tensors in told["layers"].items()
            }
            agent = self._agent.meet(base64.b64decode(told["agent"]), deadline)
            self._met[source] = published, _Offer(agent, layers)
        return self._met[source][1].layers

    def _request(
        self,
        offer: _Offer,
        layer: str,
        moves: Sequence[Move],
        targets: Mapping[str, WeightSlots],
        deadline: float,
    ) -> _Request:
        offered = offer.layers[layer]
        remote = [offered[name].slot(move.source_slot) for move in moves for name in targets]
        local = [target.slot(move.slot) for move in moves for target in targets.values()]
        kind = next(iter(targets.values())).kind
        with _blaming(moves[0].source, moves):
            read = self._agent.read(offer.agent, remote, local, kind, deadline)
        if isinstance(read, str):
            raise _failed(moves[0].source, moves, read)
        return _Request(moves[0].source, moves, sum(region.size for region in local), read)


def _wait(
    requests: Sequence[_Request],
    deadline: float,
    timeout_s: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    pending = {request.source: request for request in requests}
    total = sum(request.bytes for request in requests)
    report_at = time.monotonic() + _SLOW_SECONDS

    def arrived() -> int:
        return total - sum(request.bytes for request in pending.values())

    def all_done() -> bool:
        nonlocal report_at
        for source, request in list(pending.items()):
            with _blaming(source, request.moves):
                state = request.read.state(deadline)
            if state == "DONE":
                del pending[source]
                if progress is not None:
                    progress(arrived(), total)
            elif state != "PROC":
                raise _failed(source, request.moves, state)
        if pending and time.monotonic() > report_at:
            report_at += _SLOW_SECONDS
            logger.info(
                "EFA EP: %.1f of %.1f MiB of expert weights are here, waiting for ranks %s",
                arrived() / 2**20,
                total / 2**20,
                sorted(pending),
            )
        return not pending

    if not wait_until(all_done, deadline):
        waiting = "; ".join(
            f"rank {source} for experts {pending[source].experts}" for source in sorted(pending)
        )
        raise RankTimeoutError(
            f"expert weights did not arrive within {timeout_s:g} s from {waiting}; {arrived()} of {total} "
            "bytes are here. What they were to be written over is undefined",
            "pull_experts",
            missing=tuple(sorted(pending)),
        )


@contextmanager
def _blaming(source: int, moves: Sequence[Move]) -> Iterator[None]:
    """Name the rank and the experts for which a call into NIXL does not come back."""
    try:
        yield
    except FabricUnavailableError as error:
        raise _failed(source, moves, str(error)) from error


def _failed(source: int, moves: Sequence[Move], reason: str) -> ExpertTransferError:
    experts = tuple(move.expert for move in moves)
    named = ", ".join(map(str, experts))
    return ExpertTransferError(
        f"rank {source} did not deliver the weights of expert {named} ({reason}): it has ended, or its host "
        "cannot be reached. Plan anew without it, from other copies or the checkpoint",
        source,
        experts,
    )


def _key(rank: int) -> str:
    return f"experts/{rank}"
