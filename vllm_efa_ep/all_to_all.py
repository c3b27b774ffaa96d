"""The public API: dispatch tokens to the ranks of their experts, and combine the results.

A round on a channel is ``dispatch_send``, ``dispatch_recv``, ``combine_send``, ``combine_recv``. The send
halves return at once, so the caller can compute between the halves while data flies::

    a2a = AllToAll(AllToAllConfig(...), TorchBootstrap(group))
    handle = a2a.dispatch_send(x, topk_ids, topk_weights)
    dispatched = a2a.dispatch_recv(handle)
    a2a.combine_send(experts(dispatched.x, ...), handle)
    out = a2a.combine_recv(handle)

When a rank is lost, a half raises ``RankLostError`` or ``RankTimeoutError`` on every other rank. They call
``mask()`` and go on without it; ``rejoin()`` lets it in again (docs/rank_loss.md).
"""

from types import TracebackType

import torch

from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.argument_checks import ALIGNMENT, aligned, check, checked, glance
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.dispatch_input import DispatchInput
from vllm_efa_ep.dispatched import Dispatched, OutputBuffers
from vllm_efa_ep.errors import ConfigurationError, EfaEpError
from vllm_efa_ep.handle import Handle
from vllm_efa_ep.memory_plan import MemoryPlan
from vllm_efa_ep.nvtx import require_cuda
from vllm_efa_ep.placement import experts_of
from vllm_efa_ep.recovery import Generations
from vllm_efa_ep.stats import Stats

__all__ = ["AllToAll", "AllToAllConfig", "Dispatched", "Handle"]


class AllToAll:
    """Dispatch and combine between the ranks of a world. One thread per channel may use it at a time.

    With two channels, either give each a thread of its own, or call the halves of both in the same order on
    all ranks: a receive half does its share of other ranks' traffic, so ranks that wait on different channels
    wait for each other (docs/protocol_model.md).

    On CUDA the halves are kernels in the caller's current stream: "reused at once" and "waits" are meant in
    the stream's order. The host waits for the GPU in ``dispatch_recv`` of the per_token layout only, which
    has to know M; while a CUDA graph is captured it returns all ``world_size * max_tokens_per_rank`` rows
    there can be, and ids of -1 in those that did not come. A kernel's error is raised by a later call.
    """

    def __init__(
        self,
        config: AllToAllConfig,
        bootstrap: Bootstrap,
        settings: Settings | None = None,
        returning: bool = False,
    ) -> None:
        """Collective: agree with all ranks, allocate, connect.

        Args:
            config: Equal on all ranks.
            bootstrap: Connects the ranks until the fabric does.
            settings: Default: read from the environment.
            returning: This process takes the place of a rank that was lost: wait until the others let it in
                with ``rejoin()``, at most ``EFA_EP_TIMEOUT_S``.

        Raises:
            ConfigurationError: A value is out of bounds or ranks disagree; nothing was started.
            FabricUnavailableError: No usable libfabric or provider.
            RankTimeoutError: Nobody let the returning rank in.

        """
        settings = settings if settings is not None else Settings.from_environment()
        self.config = config
        require_cuda(settings)
        self._generations = Generations(config, bootstrap, settings, returning)
        try:
            self.world = self._generations.current().world
            self.local_experts = experts_of(config.placement(self.world.size), self.world.rank)
            self._plan = config.memory_plan(self.world.size, self.world.ranks_per_node, self.rank)
            memory = self._generations.current().connection.memory
            self._device = memory.device
            self._results = glance(config.combine_dtype, self._device)
            self._buffers = [
                OutputBuffers(config, len(self.local_experts), self.expert_capacity, memory)
                for _ in range(config.channels)
            ]
        except BaseException as error:  # nobody has this instance to close it, and the others wait for it
            self.__exit__(type(error), error, error.__traceback__)
            raise

    @property
    def rank(self) -> int:
        """This rank."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Number of ranks, lost ones included; it never changes."""
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

        Raises:
            ConfigurationError: Rows are quantised on their way, so there is no copy to save.

        """
        generation = self._generations.on(channel)
        if not generation.activations:
            raise ConfigurationError(
                f"with quantisation {self.config.quantisation!r} no memory takes tokens as they are sent; "
                "pass any bfloat16 tensor to dispatch_send"
            )
        return generation.activations[channel]

    def expert_output(self, handle: Handle) -> torch.Tensor:
        """Return memory that other ranks read: experts that write their output here save a copy of every row.

        Returns:
            ``[M, H]`` of ``config.combine_dtype``, uninitialised, for the M rows of ``dispatch_recv``. Pass
            it to ``combine_send``; from then on it must stay untouched until the channel's next
            ``dispatch_recv``.

        Raises:
            ConfigurationError: The layout is per_expert: its outputs are summed, so they need another place.
                Or ``dispatch_recv`` is still to come.

        """
        generation = self._generations.in_flight(handle)
        if self.config.layout == "per_expert":
            raise ConfigurationError(
                "expert_output() is for layout per_token; in per_expert, experts use tensors of their own"
            )
        return generation.results[handle.channel][: self._buffers[handle.channel].rows]

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        channel: int = 0,
        count: torch.Tensor | None = None,
    ) -> Handle:
        """Send tokens to the ranks of their experts; waits for nobody.

        The inputs may be reused at once, but for an ``x`` that is (the first rows of) ``activations()``.

        Args:
            x: ``[T, columns]`` of ``config.input_dtype``: ``config.dtype``, or bfloat16 to be quantised.
                Copied first if it is not contiguous, not at a multiple of 16 bytes, or rows of
                ``activations()`` but not the first ones.
            topk_ids: int32 or int64 ``[T, K]`` global expert ids; -1 drops a slot. So does an expert whose
                rank is lost; it is counted (``Stats.dropped_slots``), and no other weight changes.
            topk_weights: float32 ``[T, K]``.
            scales: float32 ``[T, S]`` if the configuration has scales.
            channel: Which channel the round uses.
            count: int32 ``[1]``: how many of the T rows are tokens, the first ones. It is read when the half
                runs, so that a captured CUDA graph serves batches of up to T tokens; ``combine_recv`` then
                leaves the other rows of its output as they are.

        Raises:
            ConfigurationError: Too many tokens, an id out of range, a wrong shape or dtype; nothing was sent.

        """
        generation = self._generations.on(channel)
        arguments = generation.glances[channel].read(x, topk_ids, topk_weights, scales, count)
        if arguments is None:
            in_place = generation.activations[channel] if generation.activations else None
            given = DispatchInput.of(  # its tensors may be copies, which live until this method returns
                self.config, self._device, in_place, x, topk_ids, topk_weights, scales, count
            )
            arguments = given.arguments()
        generation.call(lambda halves: halves.dispatch_send(channel, *arguments))
        self._buffers[channel].start_round()
        *_, tokens, _ = arguments
        return Handle(channel, generation.start_round(channel), tokens, generation.membership.generation)

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        """Wait for all rows for this rank's experts.

        Raises:
            RankLostError: A rank is gone; the message names it.
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        generation = self._generations.in_flight(handle)
        buffers = self._buffers[handle.channel]
        rows = generation.call(
            lambda halves: halves.dispatch_recv(handle.channel, buffers.room, *buffers.addresses)
        )
        if rows > buffers.room:
            buffers.grow(rows)
            generation.call(lambda halves: halves.dispatch_pack(handle.channel, *buffers.addresses))
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
        generation = self._generations.in_flight(handle)
        config = self.config
        per_slot = config.layout == "per_token" and expert_output.ndim == 3
        shape: tuple[int, ...]
        if config.layout == "per_expert":
            shape = (self.num_local_experts, self.expert_capacity, config.hidden_size)
        else:
            rows = self._buffers[handle.channel].rows
            shape = (rows, config.top_k, config.hidden_size) if per_slot else (rows, config.hidden_size)
        summed = len(shape) == 2
        if summed and weights_applied is False:
            raise ConfigurationError(
                "expert_output [M, H] is summed over experts, so combine cannot weight it any more; apply "
                "the weights in the experts, or pass [M, K, H]"
            )
        address = self._results.address(expert_output, shape)
        if not address:
            check("expert_output", expert_output, shape, (config.combine_dtype,), self._device)
            expert_output = aligned(expert_output)
            address = expert_output.data_ptr()
        applied = summed if weights_applied is None else weights_applied
        generation.call(lambda halves: halves.combine_send(handle.channel, address, per_slot, applied))

    def combine_recv(self, handle: Handle, out: torch.Tensor | None = None) -> torch.Tensor:
        """Wait for all results and write one row per dispatched token.

        Args:
            handle: The round.
            out: ``[T, H]`` of ``config.combine_dtype``, contiguous, at a multiple of 16 bytes; default: a new
                tensor. Tokens without experts get zeros.

        Raises:
            RankLostError: A rank is gone; the message names it.
            RankTimeoutError: Ranks did not send in time; the message names them.
            TransportError: The network failed.

        """
        generation = self._generations.in_flight(handle)
        shape = (handle.tokens, self.config.hidden_size)
        if out is None:
            out = torch.empty(shape, dtype=self.config.combine_dtype, device=self._device)
        address = self._results.address(out, shape) or self._address_to_write(out, shape)
        generation.call(lambda halves: halves.combine_recv(handle.channel, address))
        return out

    def _address_to_write(self, out: torch.Tensor, shape: tuple[int, ...]) -> int:
        if checked("out", out, shape, (self.config.combine_dtype,), self._device) is not out:
            raise ConfigurationError(
                "out must be contiguous, since it is written in place; pass out.contiguous()"
            )
        address = out.data_ptr()
        if address % ALIGNMENT:
            raise ConfigurationError(
                f"out starts {address % ALIGNMENT} bytes behind a multiple of {ALIGNMENT}, which kernels "
                "write at a time; pass a tensor that is no part of another, for example of torch.empty()"
            )
        return address

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        channel: int = 0,
        count: torch.Tensor | None = None,
    ) -> tuple[Dispatched, Handle]:
        """Both halves of dispatch at once."""
        handle = self.dispatch_send(x, topk_ids, topk_weights, scales, channel, count)
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

    def active_ranks(self) -> tuple[int, ...]:
        """Return the live ranks, ascending: those that the last mask agreed on."""
        return self._generations.current().membership.members

    def lost_ranks(self) -> tuple[int, ...]:
        """Return the ranks left out by the last mask and those whose end was noticed since. Asks nobody."""
        generation = self._generations.current()
        gone = {*range(self.world_size)} - {*generation.membership.members} | generation.connection.watch.gone
        return tuple(sorted(gone))

    def fault(self) -> torch.Tensor:
        """Return a bool on the instance's device: whether a half has failed, in the current stream's order.

        A half that fails raises when it is called, or on CUDA when the next one is. A replayed CUDA graph
        calls none, so ask here before its results are used. Never waits.
        """
        return self._generations.current().fault()

    def raise_fault(self) -> None:
        """Raise what ``fault`` found.

        Raises:
            EfaEpError: As the half would have.

        """
        self._generations.current().raise_fault()

    @property
    def incarnation(self) -> int:
        """How often this rank has come back: 0 for the process that was there at the start."""
        return self._generations.current().membership.incarnations[self.rank]

    def mask(self) -> tuple[int, ...]:
        """Collective among the survivors: agree on the live ranks, and go on without the others.

        To be called after a half raised ``RankLostError``, ``RankTimeoutError`` or ``TransportError``, or at
        any other time; it ends the waits of all ranks, who call it then, too. Rounds in flight are lost on
        all ranks, and so are views of ``activations()`` and ``expert_output()``: ask for new ones. It takes
        as long as connecting does; longer, by ``EFA_EP_MASK_WINDOW_S`` at most, if a rank is silent without
        being dead.

        Returns:
            The live ranks, ascending.

        Raises:
            RankExcludedError: The others went on without this rank: ``rejoin()``, or end.
            EfaEpError: The bootstrap does not answer, or every new world failed at its start.

        """
        self._generations.mask()
        return self.active_ranks()

    def rejoin(self) -> tuple[int, ...]:
        """Collective between two rounds: let ranks in that came back; an excluded rank comes back itself.

        Without a lost rank it returns at once, and while nobody waits it asks the bootstrap one question. All
        live ranks call it between the same two rounds. A rank that was excluded waits for their call.

        Returns:
            The live ranks, ascending.

        Raises:
            RankTimeoutError: Nobody let this excluded rank in within ``EFA_EP_TIMEOUT_S``.
            EfaEpError: As for ``mask``.

        """
        self._generations.rejoin()
        return self.active_ranks()

    def memory_plan(self) -> MemoryPlan:
        """Return what this instance allocated. Each stand-in for a lost rank takes another arena."""
        return self._plan

    def drain(self) -> None:
        """Wait until the network has completed the writes of all halves that were called.

        Rounds need no such wait. It is for those who count: a half returns when its own part is done, while
        its writes are posted and counted in their own time, so only after this is ``stats()`` exact.

        Raises:
            RankTimeoutError: A rank did not take its writes within ``EFA_EP_TIMEOUT_S``.
            EfaEpError: As for a half.

        """
        self._generations.working().drain()

    def stats(self) -> Stats:
        """Return the totals so far, those of earlier generations included; exact after ``drain()``."""
        return self._generations.stats()

    def close(self) -> None:
        """Collective, unless a failure came first: finish own writes, wait for the others, free all.

        A rank that is gone or silent is no error any more, since every round that returned is complete: it is
        logged as a warning.
        """
        self._generations.close()

    def __enter__(self) -> "AllToAll":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error without waiting for the others."""
        if kind is not None:
            self._generations.abandon(EfaEpError(f"closed after {kind.__name__}: {error}"))
        self.close()
