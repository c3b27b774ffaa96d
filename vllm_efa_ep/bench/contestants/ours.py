"""This package, through its public interface."""

from dataclasses import asdict
from typing import Any

import torch

from vllm_efa_ep.all_to_all import AllToAll
from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.problem import Problem, WrongResultError

_PER_ROUND = ("writes", "bytes_written", "network_rows", "retries")
_ENVIRONMENT = ("provider", "fabric", "library", "nics", "huge_pages")


class Ours(Contestant):
    """``AllToAll`` in the per-token layout; the experts apply the weights, as in every other contestant.

    The layer before and the experts write where this package asks them to, ``activations()`` and
    ``expert_output()``; that happens once, before the clock starts.
    """

    name = "ours"
    steps = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate and connect for exactly this cell."""
        super().__init__(problem, workplace)
        config = problem.cell.config(problem.inputs.x.device.type)
        self._all_to_all = AllToAll(config, workplace.bootstrap, workplace.settings)
        self._x, self._expert_output = self._place()

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and the experts' output as the steps take them."""
        inputs = self.problem.inputs
        x = self._all_to_all.activations().copy_(inputs.x)
        _, handle = self._all_to_all.dispatch(x, inputs.ids, inputs.weights, inputs.scales)
        output = self._all_to_all.expert_output(handle).copy_(self.problem.expert_output)
        self._all_to_all.combine(output, handle)
        return x, output

    def dispatch_send(self) -> None:
        """Send tokens."""
        inputs = self.problem.inputs
        self._handle = self._all_to_all.dispatch_send(self._x, inputs.ids, inputs.weights, inputs.scales)

    def dispatch_recv(self) -> None:
        """Receive tokens."""
        self._dispatched = self._all_to_all.dispatch_recv(self._handle)

    def combine_send(self) -> None:
        """Send expert outputs."""
        self._all_to_all.combine_send(self._expert_output, self._handle)

    def combine_recv(self) -> None:
        """Receive results."""
        self._all_to_all.combine_recv(self._handle, self.problem.out)

    def check(self) -> None:
        """Compare with the oracle."""
        rows = self._dispatched
        ids, weights = rows.topk_ids, rows.topk_weights
        if ids is None or weights is None:
            raise WrongResultError(f"{self.name}: no ids and weights came with the rows")
        self.problem.check_dispatch(self.name, rows.x, rows.scales, ids, weights, of_all=False)
        self.problem.check_out(self.name, self.problem.out)

    def counters(self) -> dict[str, float]:
        """Return what crossed the network, and seconds of waiting per half."""
        self._all_to_all.drain()
        stats = self._all_to_all.stats()
        waits = {f"wait_{half}_s": seconds for half, seconds in stats.wait_seconds.items()}
        return {name: float(getattr(stats, name)) for name in _PER_ROUND} | waits

    def environment(self) -> dict[str, Any]:
        """Return which network was used."""
        stats = asdict(self._all_to_all.stats())
        return {name: stats[name] for name in _ENVIRONMENT}

    def close(self) -> None:
        """Close the connections and unmap the memory."""
        self._all_to_all.close()


class OursElsewhere(Ours):
    """The same, with activations and expert outputs in ordinary tensors, as today's models have them."""

    name = "ours_elsewhere"

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.problem.inputs.x, self.problem.expert_output
