"""CUDA graphs without a GPU: a program, run by test_cuda_rounds.py (cuda_on_fibers.py says how).

Each rank captures a round once. The graph is replayed with other tokens; then a rank is lost, and the others
replay the graph that they have; then a new process takes the lost one's place.

    python graphs_on_fibers.py DIRECTORY_OF_CORE LIBFABRIC per_expert|per_token
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import torch
from cuda_on_fibers import Streams, fake_cuda, load_core
from fake_driver import FakeDriver

if TYPE_CHECKING:
    from vllm_efa_ep import AllToAll, Dispatched

_SIZE, _RANKS_PER_NODE, _VICTIM = 4, 2, 2
_TOKENS, _HIDDEN, _TOP_K, _EXPERTS = 8, 32, 3, 8
_REPLAYS = 4
_KERNELS = 8  # of a round with several nodes of several ranks: docs/cuda_kernels.md


@dataclass
class Graph:
    """A captured round. Experts are the identity, so a token comes back as often as it is summed.

    per_expert: once per expert, times its weight. per_token: once per rank, which has the weights applied.
    """

    streams: Streams
    driver: FakeDriver
    rank: int
    x: torch.Tensor = field(default_factory=lambda: torch.zeros(_TOKENS, _HIDDEN))
    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(_TOKENS, _TOP_K, dtype=torch.int32))
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(_TOKENS, _TOP_K))
    count: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    out: torch.Tensor = field(default_factory=lambda: torch.zeros(_TOKENS, _HIDDEN))
    recorded: list[int] = field(default_factory=list)
    received: "Dispatched | None" = None

    def capture(self, all_to_all: "AllToAll") -> None:
        """Record a round; nothing but kernel launches may happen meanwhile."""
        before = len(self.driver.calls())
        with self.streams.capture() as self.recorded:
            self.received, handle = all_to_all.dispatch(self.x, self.ids, self.weights, count=self.count)
            all_to_all.combine(self.received.x, handle, self.out)
        calls = self.driver.calls()[before:]
        # Rows that do not come are marked, where ids are received.
        marks = ["cuMemsetD32Async"] if all_to_all.config.layout == "per_token" else []
        assert calls == marks, calls
        assert self.streams.size(self.recorded) == _KERNELS + len(marks)

    def replay(self, all_to_all: "AllToAll", rounds: int, seed: int) -> int:
        """Run it with other tokens and check what comes back; return how many slots were dropped."""
        owners = torch.tensor(all_to_all.config.placement(_SIZE))
        live = torch.tensor([rank in all_to_all.active_ranks() for rank in range(_SIZE)])
        random = torch.Generator().manual_seed(seed + self.rank)
        dropped = 0
        for _ in range(rounds):
            self.x.copy_(torch.randint(-8, 9, self.x.shape, generator=random))
            self.ids.copy_(torch.randint(-1, _EXPERTS, self.ids.shape, generator=random))
            self.weights.copy_(torch.randint(1, 8, self.weights.shape, generator=random) / 4)
            self.count.copy_(torch.randint(_TOKENS // 2, _TOKENS + 1, (1,), generator=random))
            self.out.zero_()
            before = all_to_all.stats().received_rows
            self.streams.replay(self.recorded)
            all_to_all._generations.current()._device._core.wait(self.streams.current())
            counted = torch.arange(_TOKENS).unsqueeze(1) < self.count
            named = (self.ids >= 0) & counted
            arrives = named & live[owners[self.ids.clamp(min=0).long()]]
            if all_to_all.config.layout == "per_expert":
                times = (self.weights * arrives).sum(1, keepdim=True)
            else:
                reached = torch.zeros(_TOKENS, _SIZE, dtype=torch.int64)
                reached.scatter_reduce_(1, owners[self.ids.clamp(min=0).long()], arrives.long(), "amax")
                times = reached.sum(1, keepdim=True)
                self.check_ids(all_to_all.stats().received_rows - before, owners)
            want = self.x * times
            torch.testing.assert_close(self.out, want, rtol=0, atol=0)
            dropped += int((named & ~arrives).sum())
        return dropped

    def check_ids(self, rows: int, owners: torch.Tensor) -> None:
        """All rows that came name an expert of this rank, and the others none, whatever they once did."""
        assert self.received is not None
        ids = self.received.topk_ids
        assert ids is not None
        assert len(ids) == _SIZE * _TOKENS
        assert 0 < rows < len(ids)
        assert (ids[rows:] == -1).all()
        came = ids[:rows]
        assert ((came >= 0) & (owners[came.clamp(min=0).long()] == self.rank)).any(1).all()


def main() -> None:
    """Capture, replay, lose a rank, replay, let it in again, replay."""
    directory, libfabric, layout = sys.argv[1:]
    streams, driver = fake_cuda(load_core(Path(directory)), "pinned")

    from thread_world import ThreadBootstrap, run_ranks, settings_of

    from vllm_efa_ep import AllToAll, AllToAllConfig
    from vllm_efa_ep.errors import RankLostError, RankTimeoutError, TransportError

    config = AllToAllConfig(
        *(_HIDDEN, _EXPERTS, _TOP_K, _TOKENS, torch.float32, torch.float32),
        layout=layout,
        device="cuda",
    )
    settings = settings_of(
        _RANKS_PER_NODE, provider="efaemu", libfabric=libfabric, chunk_bytes=300, num_sms=2, timeout_s=20.0
    )
    together = Barrier(_SIZE, timeout=60)

    def survive(all_to_all: AllToAll, graph: Graph) -> None:
        place = all_to_all.activations().data_ptr()
        try:
            while True:
                graph.replay(all_to_all, 1, seed=2)
        except (RankLostError, RankTimeoutError, TransportError):
            live = all_to_all.mask()
        assert _VICTIM not in live
        together.wait()
        assert all_to_all.activations().data_ptr() == place
        before = all_to_all.stats()
        dropped = graph.replay(all_to_all, _REPLAYS, seed=3)
        after = all_to_all.stats()
        assert dropped > 0
        assert after.rounds - before.rounds == _REPLAYS  # of which the host has launched none itself
        assert after.dropped_slots - before.dropped_slots == dropped
        assert after.stand_ins == (all_to_all.rank == _VICTIM + 1)
        rounds = 0
        while len(all_to_all.rejoin()) < _SIZE:
            graph.replay(all_to_all, 1, seed=1000 + rounds)
            rounds += 1
        print(f"rank {all_to_all.rank}: {dropped} slots dropped, then {rounds} rounds until it was back")

    def body(bootstrap: ThreadBootstrap) -> None:
        all_to_all = AllToAll(config, bootstrap, settings)
        graph = Graph(streams, driver, bootstrap.rank)
        graph.capture(all_to_all)
        together.wait()
        assert graph.replay(all_to_all, _REPLAYS, seed=1) == 0
        together.wait()
        if bootstrap.rank == _VICTIM:
            all_to_all.__exit__(RuntimeError, RuntimeError("lost"), None)
            together.wait()
            all_to_all = AllToAll(config, bootstrap, settings, returning=True)
            graph.capture(all_to_all)
        else:
            survive(all_to_all, graph)
        assert graph.replay(all_to_all, _REPLAYS, seed=4) == 0
        all_to_all.close()

    run_ranks(_SIZE, body)
    print("passed", flush=True)


if __name__ == "__main__":
    main()
