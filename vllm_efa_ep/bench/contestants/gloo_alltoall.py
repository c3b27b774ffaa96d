"""Peer (b): all_to_all_single over gloo, after an exchange of the counts."""

import torch
import torch.distributed as dist

from vllm_efa_ep.bench.contestants.row_exchange import RowExchange


class GlooAllToAll(RowExchange):
    """``torch.distributed.all_to_all_single`` with split sizes."""

    name = "gloo_alltoall"

    def exchange_counts(self, sent: torch.Tensor) -> list[int]:
        """Return how many rows each rank will send here."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.workplace.group)
        return received.tolist()

    def exchange_rows(
        self, received: torch.Tensor, received_rows: list[int], sent: torch.Tensor, sent_rows: list[int]
    ) -> None:
        """Fill ``received``, ordered by source, with the rows of ``sent``, ordered by destination."""
        dist.all_to_all_single(received, sent, received_rows, sent_rows, group=self.workplace.group)
