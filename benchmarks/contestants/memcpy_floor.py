"""Floor of one node: a plain copy of the payload bytes each way."""

import ctypes

from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.problem import Problem


class MemcpyFloor(Contestant):
    """Each rank copies the bytes of the rows that it sends, then of the outputs that it returns, once.

    One contiguous memory copy per half, with no routing, packing, waiting or summing. Rows between a rank and
    itself count, because they too must be brought into the experts' order.
    """

    name = "memcpy"

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate a source and a destination."""
        super().__init__(problem, workplace)
        cell = problem.cell
        rows = cell.world * cell.tokens
        self._source = workplace.scratch.rows("sent", rows, cell.hidden, cell.format.dispatch).data_ptr()
        self._target = workplace.scratch.rows("received", rows, cell.hidden, cell.format.dispatch).data_ptr()
        self._dispatch_bytes = sum(problem.sent_rows) * cell.row_bytes
        self._combine_bytes = sum(problem.received_rows) * cell.row_bytes

    def dispatch(self) -> None:
        """Copy the bytes of the rows this rank sends."""
        ctypes.memmove(self._target, self._source, self._dispatch_bytes)

    def combine(self) -> None:
        """Copy the bytes of the outputs this rank returns."""
        ctypes.memmove(self._source, self._target, self._combine_bytes)

    def check(self) -> None:
        """Nothing to compare: a copy computes nothing."""
