"""vLLM's expert load balancer (EPLB) on our expert transfer, where it would use NIXL by itself.

vLLM's communicator ``nixl`` always takes NIXL's UCX plug-in, which emulates its reads over EFA, keeps to
GPUs, and waits for a transfer without a deadline. Ours takes LIBFABRIC where there is EFA, and names the rank
it waits for.
"""

import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator
from vllm.distributed.stateless_coordinator import StatelessGroupCoordinator
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.errors import ExpertTransferError
from vllm_efa_ep.experts_plan import Move
from vllm_efa_ep.experts_transfer import ExpertTransfer
from vllm_efa_ep.vllm_plugin import logger
from vllm_efa_ep.weight_slots import WeightSlots


def apply() -> None:
    """Wrap the choice of the communicator; call once, in workers that use our backends."""
    original = eplb_state.create_eplb_communicator
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_eplb_communicator(*args: Any, **kwargs: Any) -> Any:
        wanted = signature.bind(*args, **kwargs).arguments
        group = wanted["group_coordinator"]
        # Elastic groups have no store of torch.distributed for us to publish in.
        if wanted["backend"] != "nixl" or isinstance(group, StatelessGroupCoordinator):
            return original(*args, **kwargs)
        return EfaEpEplbCommunicator(group.cpu_group, wanted["expert_weights"], wanted["expert_buffer"])

    eplb_state.create_eplb_communicator = create_eplb_communicator


class EfaEpEplbCommunicator(EplbCommunicator):  # type: ignore[misc]
    """Pulls the experts of one layer at a time; collective where vLLM's communicators are."""

    def __init__(
        self,
        cpu_group: Any,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        expert_buffer: Sequence[torch.Tensor],
    ) -> None:
        """Collective: offer this rank's weights.

        Args:
            cpu_group: The gloo group of the EP ranks.
            expert_weights: By layer, tensors of ``[local experts, ...]``.
            expert_buffer: Where experts of any one layer arrive; like its tensors.

        """
        self._rank = cpu_group.rank()
        self._world_size = cpu_group.size()
        self._buffers = {str(index): tensor for index, tensor in enumerate(expert_buffer)}
        self._slots = WeightSlots.of("expert_buffer", expert_buffer[0])
        self.set_stream(None)
        self._layer = ""
        self._experts: np.ndarray[Any, Any] = np.empty((0, 0))
        self._moves: list[Move] = []
        self._transfer = ExpertTransfer(TorchBootstrap(cpu_group))
        weakref.finalize(self, self._transfer.close)
        self._transfer.offer(
            {
                str(layer): {str(index): tensor for index, tensor in enumerate(tensors)}
                for layer, tensors in enumerate(expert_weights)
            }
        )
        logger.info("EFA EP rank %d: expert weights move over NIXL's %s", self._rank, self._transfer.backend)

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """No: its buffers are those that vLLM passes."""
        return False

    def set_transfer_context(self, old_indices: "np.ndarray[Any, Any]", layer_idx: int) -> None:
        """Take the layer, and the expert of every slot of all ranks.

        Reads bypass the GPU's streams, so this waits for what still copies out of the buffer.
        """
        if self._slots.kind == "VRAM":
            with gpu_sync_allowed():
                torch.cuda.current_stream().synchronize()
                if self._stream is not None:
                    self._stream.synchronize()
        self._layer = str(layer_idx)
        self._experts = old_indices[: self._world_size * self._slots.slots].reshape(self._world_size, -1)

    def add_send(self, tensors: list[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Do nothing: the receiver reads what was offered."""

    def add_recv(self, tensors: list[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Remember an expert to fetch, and the part of the buffer it goes to."""
        (held,) = np.nonzero(self._experts[src_rank] == expert_id)
        if len(held) == 0:
            raise ExpertTransferError(
                f"rank {src_rank} is to send expert {expert_id} of layer {self._layer}, but does not have it",
                src_rank,
                (expert_id,),
            )
        slot = self._slots.slot_at(tensors[0].data_ptr())
        self._moves.append(Move(expert_id, src_rank, int(held[0]), slot))

    def execute(self) -> None:
        """Fetch them, and wait until all ranks have theirs."""
        moves, self._moves = self._moves, []
        self._transfer.pull_together(self._layer, moves, self._buffers)
