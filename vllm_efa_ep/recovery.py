"""From one generation to the next: agree on the live ranks, give the old generation up, build the new one."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from vllm_efa_ep import __version__
from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import (
    ConfigurationError,
    EfaEpError,
    RankExcludedError,
    RankLostError,
    RankTimeoutError,
    TransportError,
)
from vllm_efa_ep.generation import Generation, build_generation, first_generation
from vllm_efa_ep.handle import Handle
from vllm_efa_ep.membership import Agreement, Membership
from vllm_efa_ep.rank_memory import kept_memory_for, resolve_device
from vllm_efa_ep.stats import Stats, Totals

logger = logging.getLogger(__name__)

# A rank may be lost while the survivors build; each time they agree once more.
_TRIES = 4


class Generations:
    """The generations that one rank lives through, one at a time."""

    def __init__(
        self,
        config: AllToAllConfig,
        bootstrap: Bootstrap,
        settings: Settings,
        returning: bool,
    ) -> None:
        """Collective: build the first; with ``returning``, wait to be let into the one that comes next."""
        self._config = config
        self._bootstrap = bootstrap
        self._settings = settings
        self._must_agree = _must_agree(config, settings)
        self._agreement = Agreement(bootstrap, settings.mask_window_s)
        self._boundaries = 0  # calls of rejoin() in this generation
        self._past = Totals()  # of earlier generations
        self._failure: EfaEpError | None = None  # why there is no generation
        self._current: Generation | None = None
        self._kept = kept_memory_for(resolve_device(config.device))
        if returning:
            self._come_back()
        else:
            self._current = first_generation(config, bootstrap, settings, self._must_agree, self._kept)
        # Stand-ins keep their NICs, however many ranks a host has lost.
        nics = len(self.current().connection.description.nics)
        self._settings = replace(settings, nics_per_rank=nics or settings.nics_per_rank)

    def current(self) -> Generation:
        """Return the generation, which may have failed; raise why there is none."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._current is None:
            raise ConfigurationError("this AllToAll is closed; build a new one")
        return self._current

    def working(self) -> Generation:
        """Return the generation, or raise what ended it."""
        generation = self.current()
        if generation.failure is not None:
            raise generation.failure.with_traceback(None)
        return generation

    def on(self, channel: int) -> Generation:
        """Return the working generation, if it has that channel."""
        generation = self._current
        if generation is None or generation.failure is not None or self._failure is not None:
            generation = self.working()  # raises why there is none
        if not 0 <= channel < self._config.channels:
            raise ConfigurationError(
                f"channel {channel} does not exist; use 0 to {self._config.channels - 1}, or set "
                "AllToAllConfig.channels"
            )
        return generation

    def in_flight(self, handle: Handle) -> Generation:
        """Return the working generation, if the handle's round is in flight there."""
        generation = self.on(handle.channel)
        if handle.generation != generation.membership.generation:
            raise ConfigurationError(
                f"the handle is of generation {handle.generation}, but the ranks have agreed on generation "
                f"{generation.membership.generation}; the round is lost, dispatch its tokens again"
            )
        if handle.round != generation.rounds[handle.channel]:
            raise ConfigurationError(
                f"the handle is of round {handle.round}, but channel {handle.channel} is in round "
                f"{generation.rounds[handle.channel]}; use each handle until its combine_recv, then drop it"
            )
        return generation

    def stats(self) -> Stats:
        """Return what this rank has done in all generations."""
        generation = self.working()
        description = generation.connection.description
        totals = self._past + generation.totals()
        return Stats(
            rank=generation.world.rank,
            world_size=generation.world.size,
            nodes=generation.world.nodes,
            provider=description.provider,
            fabric=description.fabric,
            library=description.library,
            nics=description.nics,
            huge_pages=generation.connection.arena.huge_pages,
            generation=generation.membership.generation,
            live_ranks=len(generation.membership.members),
            stand_ins=len(generation.stand_ins),
            half_seconds=totals.half_seconds,
            wait_seconds=totals.wait_seconds,
            half_buckets=totals.half_buckets,
            wait_buckets=totals.wait_buckets,
            waited_for_seconds=totals.waited_for_seconds,
            **totals.counters,  # type: ignore[arg-type]
        )

    def mask(self) -> None:
        """Collective between the survivors: give the generation up for one without the lost ranks."""
        self._leave({})

    def rejoin(self) -> None:
        """Collective between two rounds: let in whoever waits; after ``RankExcludedError``, be let in."""
        if isinstance(self._failure, RankExcludedError):
            self._come_back()
            return
        generation = self.working()
        if len(generation.membership.members) == generation.world.size:
            return
        returning = self._agreement.waiting(generation.membership, self._boundaries)
        self._boundaries += 1
        if returning:
            self._finish(generation)
            self._leave(returning)

    def abandon(self, failure: EfaEpError) -> None:
        """Do not wait for the others in ``close``."""
        if self._failure is None:
            self._failure = failure

    def close(self) -> None:
        """Collective, unless a failure came first: finish own writes, wait for the others, free all."""
        if self._current is None:
            return
        try:
            if self._failure is None and self._current.failure is None:
                self._finish(self._current)
                self._current.connection.watch.leave()
        finally:
            self._current.close()
            self._current = None
            if self._kept is not None:
                self._kept.close()

    def _finish(self, generation: Generation) -> None:
        try:
            generation.finish()
        except (RankLostError, RankTimeoutError, TransportError) as error:
            reason = generation.connection.watch.verdict() or error
            logger.warning("EFA EP: closed without the others: %s", reason)

    def _leave(self, returning: Mapping[int, int]) -> None:
        old = self.current()
        watch = old.connection.watch
        watch.call_off()
        self._past += old.totals()

        def agree() -> Membership:
            try:
                # The watch still tells who is gone; everything else waits for the agreement.
                return self._agreement.next(old.membership, lambda: watch.gone, returning)
            finally:
                old.close()

        self._enter(agree, lambda: watch.gone)

    def _come_back(self) -> None:
        self._failure = None
        self._enter(lambda: self._agreement.come_back(self._settings.timeout_s), frozenset)

    def _enter(self, agree: Callable[[], Membership], gone: Callable[[], frozenset[int]]) -> None:
        """Go on in the generation that is agreed on, or remember why not."""
        self._current = None
        self._boundaries = 0
        try:
            self._current = self._build_until_it_stands(agree(), gone)
        except EfaEpError as error:
            self._failure = error
            raise
        logger.info(
            "EFA EP: rank %d is in generation %d of ranks %s, stands in for %s",
            self._bootstrap.rank,
            self._current.membership.generation,
            ", ".join(map(str, self._current.membership.members)),
            ", ".join(str(each.rank) for each in self._current.stand_ins) or "nobody",
        )

    def _build_until_it_stands(
        self, membership: Membership, gone: Callable[[], frozenset[int]]
    ) -> Generation:
        for _ in range(_TRIES):
            try:
                return build_generation(
                    self._config, self._bootstrap, self._settings, self._must_agree, membership, self._kept
                )
            except EfaEpError as error:
                failure = f"generation {membership.generation} failed at its start: {error}"
                logger.warning("EFA EP: %s", failure)
            membership = self._agreement.next(membership, gone, {})
        # Not the error itself: its frames refer to the memory of the generation that failed.
        raise EfaEpError(f"the ranks agreed {_TRIES} times on a mask and could not start; {failure}")


def _must_agree(config: AllToAllConfig, settings: Settings) -> dict[str, object]:
    wanted = {name: str(value) for name, value in asdict(config).items()}
    return {
        **wanted,
        "device": resolve_device(config.device),
        "EFA_EP_CHUNK_BYTES": settings.chunk_bytes,
        "EFA_EP_GPU_HANDLES": settings.gpu_handles,
        "EFA_EP_RANKS_PER_NODE": settings.ranks_per_node,
        "EFA_EP_TRACE is set": bool(settings.trace),
        "vllm_efa_ep version": __version__,
    }
