"""This package, through its public interface."""

import torch

from benchmarks.contestants.contestant import Contestant, Workplace
from benchmarks.problem import NUM_EXPERTS, TOP_K, Problem, WrongResultError
from vllm_efa_ep.all_to_all import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.torch import TorchBootstrap


class Ours(Contestant):
    """``AllToAll`` in the per-token layout; the experts apply the weights, as in every other contestant.

    The layer before and the experts write where this package asks them to, ``activations()`` and
    ``expert_output()``; that happens once, before the clock starts.
    """

    name = "ours"

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate and connect for exactly this cell."""
        super().__init__(problem, workplace)
        cell = problem.cell
        config = AllToAllConfig(
            hidden_size=cell.hidden,
            num_experts=NUM_EXPERTS,
            top_k=TOP_K,
            max_tokens_per_rank=cell.tokens,
            dtype=cell.torch_dtype,
            combine_dtype=cell.torch_dtype,
        )
        self._all_to_all = AllToAll(config, TorchBootstrap(workplace.group), workplace.settings)
        self._x, self._expert_output = self._place()

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and the experts' output as the halves take them."""
        x = self._all_to_all.activations().copy_(self.problem.inputs.x)
        _, handle = self._all_to_all.dispatch(x, self.problem.inputs.ids, self.problem.inputs.weights)
        output = self._all_to_all.expert_output(handle).copy_(self.problem.expert_output)
        self._all_to_all.combine(output, handle)
        return x, output

    def dispatch(self) -> None:
        """Send and receive tokens."""
        inputs = self.problem.inputs
        self._handle = self._all_to_all.dispatch_send(self._x, inputs.ids, inputs.weights)
        self._dispatched = self._all_to_all.dispatch_recv(self._handle)

    def combine(self) -> None:
        """Send and receive expert outputs."""
        self._all_to_all.combine_send(self._expert_output, self._handle)
        self._all_to_all.combine_recv(self._handle, self.problem.out)

    def check(self) -> None:
        """Compare with the oracle."""
        rows = self._dispatched
        ids, weights = rows.topk_ids, rows.topk_weights
        if ids is None or weights is None:
            raise WrongResultError(f"{self.name}: no ids and weights came with the rows")
        self.problem.check_dispatch(self.name, rows.x, ids, weights, of_all=False)
        self.problem.check_out(self.name, self.problem.out)

    def close(self) -> None:
        """Close the connections and unmap the memory."""
        self._all_to_all.close()


class OursElsewhere(Ours):
    """The same, with activations and expert outputs in ordinary tensors, as today's models have them."""

    name = "ours_elsewhere"

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.problem.inputs.x, self.problem.expert_output
