"""Peer (c): Open MPI's alltoallv through mpi4py, after an exchange of the counts."""

import torch
from mpi4py import MPI

from vllm_efa_ep.bench.contestants.row_exchange import RowExchange


class MpiAllToAllv(RowExchange):
    """``MPI_Alltoallv`` over shared memory or TCP, whichever the launch chose."""

    name = "mpi_alltoallv"

    def exchange_counts(self, sent: torch.Tensor) -> list[int]:
        """Return how many rows each rank will send here."""
        received = torch.empty_like(sent)
        self.workplace.mpi.Alltoall(sent.numpy(), received.numpy())
        return received.tolist()

    def exchange_rows(
        self, received: torch.Tensor, received_rows: list[int], sent: torch.Tensor, sent_rows: list[int]
    ) -> None:
        """Fill ``received``, ordered by source, with the rows of ``sent``, ordered by destination."""
        words = sent.shape[1]
        self.workplace.mpi.Alltoallv(
            [sent.numpy(), [rows * words for rows in sent_rows], MPI.INT32_T],
            [received.numpy(), [rows * words for rows in received_rows], MPI.INT32_T],
        )
