"""Peer (a): all-gather and reduce-scatter, the collectives of vLLM's default backend, on gloo and on NCCL."""

from typing import ClassVar

import torch
import torch.distributed as dist

from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.problem import Problem

# Newer torch renames both; older torch has only the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class AllGather(Contestant):
    """As vLLM's ``AgRsAll2AllManager``: hidden states, weights and ids gathered, outputs reduce-scattered.

    All ranks have the same number of tokens, so vLLM's ``all_gatherv`` and ``reduce_scatterv`` are the plain
    collectives. vLLM allocates its outputs on every call; here they exist beforehand.

    Attributes:
        backend: Of torch.distributed.

    """

    backend: ClassVar[str]

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate the gathered tensors."""
        super().__init__(problem, workplace)
        cell, inputs = problem.cell, problem.inputs
        self._group = workplace.group(self.backend)
        device = problem.device
        rows = cell.world * cell.tokens
        self._x = workplace.scratch.rows("received", rows, cell.hidden, cell.format.dispatch)
        self._weights = torch.empty(rows, cell.top_k, device=device)
        self._ids = torch.empty(rows, cell.top_k, dtype=torch.int32, device=device)
        self._scales = None
        if inputs.scales is not None:
            self._scales = torch.empty(rows, cell.scale_columns, device=device)
        self._gathers = [(self._x, inputs.x), (self._weights, inputs.weights), (self._ids, inputs.ids)]
        if self._scales is not None and inputs.scales is not None:
            self._gathers.append((self._scales, inputs.scales))
        if cell.format.dispatch.itemsize == 1:  # gloo does not know fp8; bytes are bytes
            self._gathers[0] = (self._x.view(torch.uint8), inputs.x.view(torch.uint8))

    def dispatch(self) -> None:
        """Gather the tokens of all ranks."""
        for gathered, own in self._gathers:
            _all_gather(gathered, own, group=self._group)

    def combine(self) -> None:
        """Sum the ranks' outputs for all tokens and keep this rank's."""
        _reduce_scatter(self.problem.out, self.problem.expert_output_of_all, group=self._group)

    def check(self) -> None:
        """Compare with the oracle."""
        self.problem.check_dispatch(self.name, self._x, self._scales, self._ids, self._weights, of_all=True)
        self.problem.check_out(self.name, self.problem.out)


class GlooAllGather(AllGather):
    """Between CPUs."""

    name = "gloo_allgather"
    backend = "gloo"


class NcclAllGather(AllGather):
    """Between GPUs."""

    name = "nccl_allgather"
    backend = "nccl"
