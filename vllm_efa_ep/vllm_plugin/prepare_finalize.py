"""What both backends share: vLLM's prepare/finalize interface on top of the halves of ``AllToAll``."""

# The signatures are vLLM's.
# ruff: noqa: ARG002

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_maybe_run_recv_hook

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all import AllToAll, Dispatched, Handle
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.placement import linear_placement, round_robin_placement
from vllm_efa_ep.vllm_plugin.error_log import one_line_per_error
from vllm_efa_ep.vllm_plugin.expert_map import check_expert_map
from vllm_efa_ep.vllm_plugin.manager import EfaEpAll2AllManager
from vllm_efa_ep.vllm_plugin.wire_format import WireFormat

PrepareResult = tuple[torch.Tensor, torch.Tensor | None, Any, torch.Tensor | None, torch.Tensor | None]
"""Expert input, its scales, ``ExpertTokensMetadata``, ids and weights of the rows."""


@dataclass
class _Round:
    """One dispatch and its combine on one channel."""

    handle: Handle
    dispatched: Dispatched | None = None


@dataclass(frozen=True)
class _Exchange:
    """What the layer sends its tokens with."""

    all_to_all: AllToAll
    wire: WireFormat


class EfaEpPrepareFinalize(mk.FusedMoEPrepareAndFinalizeModular):  # type: ignore[misc]
    """Dispatches in ``prepare``, combines in ``finalize``.

    Both are asynchronous: the first half sends, vLLM then computes shared experts (or, with dual-batch
    overlap, the other micro-batch), and the hook it calls afterwards receives. Each micro-batch has a
    channel of its own.
    """

    layout: ClassVar[Literal["per_token", "per_expert"]]

    def __init__(self, manager: EfaEpAll2AllManager, moe: Any, quant_config: Any, round_robin: bool) -> None:
        """Describe the exchange.

        Args:
            manager: The manager of the EP group.
            moe: vLLM's ``FusedMoEConfig`` of the layer.
            quant_config: vLLM's ``FusedMoEQuantConfig`` of the layer, or None.
            round_robin: Whether experts are dealt out one by one instead of in blocks.

        """
        super().__init__()
        self._manager = manager
        self._moe = moe
        self._quant_config = quant_config
        placement = round_robin_placement if round_robin else linear_placement
        self._owners = placement(moe.num_experts, manager.world_size)
        self._channels = _channels(get_current_vllm_config().parallel_config)
        self._rounds: list[_Round | None] = [None] * self._channels
        self._exchange: _Exchange | None = None
        self._placement_checked = False

    def post_init_setup(self, fused_experts: Any) -> None:
        """Connect the ranks, now that the experts say what input they take; collective.

        Block-quantised input travels quantised, with its scales; everything else as it is.
        """
        moe = self._moe
        wire = WireFormat.of(
            moe,
            self._quant_config,
            fused_experts.expects_unquantized_inputs,
            self._takes_byte_scales(fused_experts),
        )
        all_to_all = self._manager.get_handle(
            {
                "hidden_size": moe.hidden_dim,
                "num_experts": moe.num_experts,
                "top_k": moe.experts_per_token,
                "max_tokens_per_rank": moe.max_num_tokens,
                "dtype": wire.dtype,
                "combine_dtype": moe.in_dtype,
                "payload_columns": wire.columns,
                "scale_columns": wire.scale_columns,
                "quantisation": wire.quantisation,
                "layout": self.layout,
                "channels": self._channels,
                "expert_to_rank": self._owners,
                "device": current_platform.device_type,
            }
        )
        self._exchange = _Exchange(all_to_all, wire)

    def topk_indices_dtype(self) -> torch.dtype | None:
        """Return the dtype of expert ids that the router must produce."""
        return torch.int32

    def num_dispatchers(self) -> int:
        """Return the number of ranks that send tokens to this one."""
        return int(self._manager.world_size)

    def output_is_reduced(self) -> bool:
        """Return True: ``finalize`` yields finished tokens of this rank."""
        return True

    def supports_async(self) -> bool:
        """Return True: vLLM then calls the ``*_async`` methods and overlaps shared experts."""
        return True

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> tuple[Callable[[], None], Callable[[], PrepareResult]]:
        """Send the tokens ``a1`` [T, H]; return the hook that receives and the receiver of the result."""
        if not self._placement_checked:
            check_expert_map(expert_map, self._owners, self._manager.rank)
            self._placement_checked = True
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise ConfigurationError(
                    f"router weights on the input need top-1 routing, not top-{topk_ids.shape[1]}: "
                    "a token is sent once for all its experts"
                )
            a1 = a1 * topk_weights.to(a1.dtype)
            topk_weights = torch.ones_like(topk_weights)
        channel = dbo_current_ubatch_id()
        exchange = self._connected()
        all_to_all, wire = exchange.all_to_all, exchange.wire
        a1, scales = wire.pack(a1, quant_config)
        with one_line_per_error():
            handle = all_to_all.dispatch_send(
                a1.contiguous(), topk_ids, topk_weights.float(), scales=scales, channel=channel
            )
        current = self._rounds[channel] = _Round(handle)

        def receive() -> None:
            with one_line_per_error():
                current.dispatched = all_to_all.dispatch_recv(handle)

        def result() -> PrepareResult:
            if current.dispatched is None:
                raise RuntimeError("vLLM asked for dispatched tokens before it called the receive hook")
            quantize_now = not (wire.is_quantized or defer_input_quant)
            scales = wire.scales(current.dispatched.scales, quant_config)
            return self._expert_input(current.dispatched, scales, quant_config, quantize_now)

        return receive, result

    def prepare(self, *args: Any, **kwargs: Any) -> PrepareResult:
        """Dispatch and wait; the arguments of ``prepare_async``."""
        receive, result = self.prepare_async(*args, **kwargs)
        receive()
        return result()

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """Send the expert output; return the hook that writes the tokens to ``output`` [T, H].

        ``fused_expert_output`` may be ``output`` itself; ``combine_send`` has read it when it returns.
        """
        current = self._current_round()
        self._rounds[current.handle.channel] = None
        all_to_all = self._connected().all_to_all
        rows, weights_applied = self._expert_output(fused_expert_output, output, weight_and_reduce_impl)
        dbo_maybe_run_recv_hook()
        with one_line_per_error():
            all_to_all.combine_send(rows, current.handle, weights_applied=weights_applied)

        def receive() -> None:
            with one_line_per_error():
                all_to_all.combine_recv(current.handle, output)

        return receive, _nothing_left

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        """Combine and wait; the arguments of ``finalize_async``."""
        receive, _ = self.finalize_async(*args, **kwargs)
        receive()

    @abstractmethod
    def _takes_byte_scales(self, fused_experts: Any) -> bool:
        """Return whether the experts take rows with scales of one byte, such as nvfp4's."""

    @abstractmethod
    def _expert_input(
        self, dispatched: Dispatched, scales: torch.Tensor | None, quant_config: Any, quantize: bool
    ) -> PrepareResult:
        """Return ``dispatched`` as the experts want it, quantised if ``quantize`` says so.

        Args:
            dispatched: What was received.
            scales: Its scales, as the experts want them; None if it travelled unquantised.
            quant_config: vLLM's ``FusedMoEQuantConfig``.
            quantize: Whether the experts want it quantised now.

        """

    @abstractmethod
    def _expert_output(
        self, rows: torch.Tensor, output: torch.Tensor, weight_and_reduce_impl: Any
    ) -> tuple[torch.Tensor, bool]:
        """Return what the experts made of their input, and whether they have weighted and reduced it.

        Args:
            rows: vLLM's ``fused_expert_output``.
            output: Where the finished tokens will go.
            weight_and_reduce_impl: What the experts leave to do.

        """

    def _place_of_results(self) -> torch.Tensor:
        """Return ``expert_output()`` of the micro-batch's round: what is there already needs no copy."""
        with one_line_per_error():
            return self._connected().all_to_all.expert_output(self._current_round().handle)

    def _current_round(self) -> _Round:
        current: _Round | None = self._rounds[dbo_current_ubatch_id()]
        if current is None:
            raise RuntimeError("vLLM finalized an MoE layer that it had not prepared")
        return current

    def _connected(self) -> _Exchange:
        if self._exchange is None:
            raise RuntimeError("vLLM used prepare/finalize before it called post_init_setup")
        return self._exchange


def _channels(parallel_config: Any) -> int:
    """Return how many micro-batches can be under way at once."""
    if not parallel_config.use_ubatching:
        return 1
    channels = int(parallel_config.num_ubatches)
    if channels > _core.limits()["channels"]:
        raise ConfigurationError(
            f"--ubatch-size {channels} needs as many channels, but there are {_core.limits()['channels']}; "
            "use --enable-dbo, which takes two micro-batches"
        )
    return channels


def _nothing_left() -> None:
    """Receiver of ``finalize_async``: the hook has already written the output."""
