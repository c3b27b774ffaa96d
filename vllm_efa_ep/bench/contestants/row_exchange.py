"""What both all-to-all peers do around their collective: route, pack, exchange, sum."""

from abc import abstractmethod

import torch

from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.problem import Problem

WORD = torch.int32


class RowExchange(Contestant):
    """One row per (token, owner rank), in one all-to-all each way after an exchange of the counts.

    A dispatched row is payload, scales, ids and weights side by side, so that one collective moves them all,
    and a combined row is bare payload. Rows are exchanged as 4-byte words. Every buffer exists beforehand.
    """

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate for the worst case, every token to every rank."""
        super().__init__(problem, workplace)
        cell, inputs = problem.cell, problem.inputs
        parts = [inputs.x, *([] if inputs.scales is None else [inputs.scales]), inputs.ids, inputs.weights]
        self._parts = [part.view(WORD) for part in parts]
        self._widths = [part.shape[1] for part in self._parts]
        words = sum(self._widths)
        combine_words = cell.combine_row_bytes // WORD.itemsize
        rows = cell.world * cell.tokens
        self._packed = torch.empty(cell.tokens, words, dtype=WORD, device=problem.device)
        self._sent = workplace.scratch.rows("sent", rows, words, WORD)
        self._received = workplace.scratch.rows("received", rows, words, WORD)
        # The rows that come back may overwrite the rows that were sent.
        self._returned = workplace.scratch.rows("sent", rows, combine_words, WORD)
        self._owners = torch.empty(cell.tokens, cell.world, dtype=torch.bool, device=problem.device)
        self._expert_output = problem.expert_output.view(WORD)

    @abstractmethod
    def exchange_counts(self, sent: torch.Tensor) -> list[int]:
        """Return how many rows each rank will send here; ``sent`` is ``[W]`` int32."""

    @abstractmethod
    def exchange_rows(
        self, received: torch.Tensor, received_rows: list[int], sent: torch.Tensor, sent_rows: list[int]
    ) -> None:
        """Fill ``received``, ordered by source, with the rows of ``sent``, ordered by destination."""

    def dispatch(self) -> None:
        """Route and pack the rows by owner and exchange them."""
        owner_of = (self.problem.inputs.ids // self.problem.experts_per_rank).long()
        self._owners.zero_().scatter_(1, owner_of, True)
        counts = self._owners.sum(0, dtype=torch.int32)
        self._sent_rows = counts.tolist()
        self._received_rows = self.exchange_counts(counts)
        self._tokens = self._owners.t().nonzero()[:, 1]
        torch.cat(self._parts, dim=1, out=self._packed)
        sent = self._sent[: len(self._tokens)]
        torch.index_select(self._packed, 0, self._tokens, out=sent)
        received = self._received[: sum(self._received_rows)]
        self.exchange_rows(received, self._received_rows, sent, self._sent_rows)

    def combine(self) -> None:
        """Send the outputs back and sum them per token."""
        returned = self._returned[: len(self._tokens)]
        self.exchange_rows(returned, self._sent_rows, self._expert_output, self._received_rows)
        out = self.problem.out
        out.zero_().index_add_(0, self._tokens, returned.view(out.dtype))

    def check(self) -> None:
        """Compare with the oracle."""
        received = self._received[: sum(self._received_rows)]
        parts = [part.contiguous() for part in torch.split(received, self._widths, dim=1)]
        scales = parts[1].view(torch.float32) if self.problem.inputs.scales is not None else None
        x, ids, weights = parts[0].view(self.problem.cell.format.dispatch), parts[-2], parts[-1]
        self.problem.check_dispatch(self.name, x, scales, ids, weights.view(torch.float32), of_all=False)
        self.problem.check_out(self.name, self.problem.out)
