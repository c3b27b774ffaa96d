"""Peer (b): all_to_all_single after an exchange of the counts, on gloo and on NCCL."""

from typing import ClassVar

import torch
import torch.distributed as dist

from vllm_efa_ep.bench.contestants.contestant import Workplace
from vllm_efa_ep.bench.contestants.row_exchange import RowExchange
from vllm_efa_ep.bench.problem import Problem


class TorchAllToAll(RowExchange):
    """``torch.distributed.all_to_all_single`` with split sizes.

    Attributes:
        backend: Of torch.distributed.

    """

    backend: ClassVar[str]

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate, and find the process group."""
        super().__init__(problem, workplace)
        self._group = workplace.group(self.backend)

    def exchange_counts(self, sent: torch.Tensor) -> list[int]:
        """Return how many rows each rank will send here."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        return received.tolist()

    def exchange_rows(
        self, received: torch.Tensor, received_rows: list[int], sent: torch.Tensor, sent_rows: list[int]
    ) -> None:
        """Fill ``received``, ordered by source, with the rows of ``sent``, ordered by destination."""
        dist.all_to_all_single(received, sent, received_rows, sent_rows, group=self._group)


class GlooAllToAll(TorchAllToAll):
    """Between CPUs."""

    name = "gloo_alltoall"
    backend = "gloo"


class NcclAllToAll(TorchAllToAll):
    """Between GPUs."""

    name = "nccl_alltoall"
    backend = "nccl"
