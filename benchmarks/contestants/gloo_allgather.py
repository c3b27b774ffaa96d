"""Peer (a): all-gather and reduce-scatter over gloo, the collectives of vLLM's default backend."""

import torch
import torch.distributed as dist

from benchmarks.contestants.contestant import Contestant, Workplace
from benchmarks.problem import TOP_K, Problem

# Newer torch renames both; older torch has only the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class GlooAllGather(Contestant):
    """As vLLM's ``AgRsAll2AllManager``: hidden states, weights and ids gathered, outputs reduce-scattered.

    All ranks have the same number of tokens, so vLLM's ``all_gatherv`` and ``reduce_scatterv`` are the plain
    collectives. vLLM allocates its outputs on every call; here they exist beforehand.
    """

    name = "gloo_allgather"

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate the gathered tensors."""
        super().__init__(problem, workplace)
        cell = problem.cell
        rows = cell.world * cell.tokens
        self._x = workplace.scratch.rows("received", rows, cell.hidden, cell.torch_dtype)
        self._weights = torch.empty(rows, TOP_K)
        self._ids = torch.empty(rows, TOP_K, dtype=torch.int32)

    def dispatch(self) -> None:
        """Gather the tokens of all ranks."""
        inputs, group = self.problem.inputs, self.workplace.group
        _all_gather(self._x, inputs.x, group=group)
        _all_gather(self._weights, inputs.weights, group=group)
        _all_gather(self._ids, inputs.ids, group=group)

    def combine(self) -> None:
        """Sum the ranks' outputs for all tokens and keep this rank's."""
        _reduce_scatter(self.problem.out, self.problem.expert_output_of_all, group=self.workplace.group)

    def check(self) -> None:
        """Compare with the oracle."""
        self.problem.check_dispatch(self.name, self._x, self._ids, self._weights, of_all=True)
        self.problem.check_out(self.name, self.problem.out)
