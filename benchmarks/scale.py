"""What one rank costs as the world grows: writes, bytes, memory, host time and events, from 8 to 1024 ranks.

All ranks are production devices and proxies in one process on an emulated network (p5en's parameters), eight
to a node. Counts are exact and carry over to hardware; host time is this machine's CPU doing the copies that
a GPU would do, so only its growth means something. Run from the root of the repository::

    python -m benchmarks.scale              # 8 to 256 ranks
    python -m benchmarks.scale --full       # to 1024
    python -m benchmarks.scale --full --update     # write table and plot into docs/scale.md as well
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.emulated_module import ROOT, emulated
from vllm_efa_ep import AllToAllConfig

RANKS_PER_NODE = 8
RANKS = (8, 16, 32, 64, 128, 256)
FULL_RANKS = (*RANKS, 512, 1024)
OUT = ROOT / "build" / "bench"
DOCUMENT = ROOT / "docs" / "scale.md"
PICTURE = DOCUMENT.with_suffix(".svg")
_SEED = 1


@dataclass(frozen=True)
class Case:
    """A world. Every token goes to ``top_k`` different experts, drawn evenly."""

    ranks: int
    tokens: int = 32
    hidden: int = 1024
    top_k: int = 8
    rounds: int = 3
    nics: int = 2
    chunk_bytes: int = 256 * 1024

    @property
    def config(self) -> AllToAllConfig:
        """The configuration of the same world on a real network."""
        return AllToAllConfig(self.hidden, max(256, self.ranks), self.top_k, self.tokens)

    def ids(self) -> list[torch.Tensor]:
        """Return each rank's ``[tokens, top_k]`` expert ids, the same in every round."""
        random = torch.Generator().manual_seed(_SEED)
        scores = torch.rand(self.ranks, self.tokens, self.config.num_experts, generator=random)
        return list(scores.topk(self.top_k, dim=-1).indices.int())


@dataclass(frozen=True)
class Measured:
    """Totals of a run, by rank; ``events`` are those of the whole network."""

    ranks: int
    rounds: int
    arena_bytes: int
    events: int
    counters: list[dict[str, int]]

    def mean(self, name: str) -> float:
        """Return a counter's mean per rank and round."""
        return sum(each[name] for each in self.counters) / self.ranks / self.rounds

    @property
    def rows(self) -> float:
        """Rows that a rank sends, offers and receives in a round."""
        return sum(self.mean(name) for name in ("network_rows", "peer_rows", "received_rows"))


class _Workload:
    """Ranks that compute nothing. All tensors lie in the arenas; what leaves them goes to one scratch."""

    def __init__(self, case: Case, world: Any) -> None:
        config = case.config
        layout = config.core_layout(case.ranks, RANKS_PER_NODE)
        self._world = world
        self._stride = layout.dispatch_row_bytes
        self._ids = case.ids()
        self._weights = torch.ones(case.tokens, case.top_k)
        rows = case.ranks * case.tokens
        self._x = torch.empty(rows, config.columns, dtype=config.dtype)
        self._slots = torch.empty(rows, case.top_k, dtype=torch.int32)
        self._counts = torch.empty(config.num_experts, dtype=torch.int32)
        self._out = torch.empty(case.tokens, case.hidden, dtype=config.combine_dtype)

    def tokens(self, rank: int, channel: int, _round: int) -> tuple[int, int, int, int, bool, int, int]:
        ids = self._ids[rank]
        x = self._world.activations(rank, channel)
        return x, self._stride, 0, ids.data_ptr(), False, self._weights.data_ptr(), len(ids)

    def receive(self, _rank: int, _channel: int, _round: int, _rows: int) -> tuple[int, int, int, int, int]:
        slots = self._slots.data_ptr()
        return self._x.data_ptr(), 0, slots, slots, self._counts.data_ptr()

    def results(self, rank: int, channel: int, _round: int) -> tuple[int, bool, bool]:
        return self._world.results(rank, channel), False, True

    def output(self, _rank: int, _channel: int, _round: int) -> int:
        return self._out.data_ptr()

    def finished(self, rank: int, channel: int, round: int) -> None:
        pass


def measure(case: Case) -> Measured:
    """Run a world.

    Raises:
        RuntimeError: A rank failed.

    """
    config = case.config
    world = emulated().World(
        world=case.ranks,
        ranks_per_node=RANKS_PER_NODE,
        top_k=case.top_k,
        payload_bytes=config.columns * config.dtype.itemsize,
        scale_bytes=0,
        combine_bytes=case.hidden * config.combine_dtype.itemsize,
        max_tokens=case.tokens,
        channels=1,
        expert_owner=list(config.placement(case.ranks)),
        combine_type="bfloat16",
        per_expert=False,
        signal_policy="counted",
        chunk_bytes=case.chunk_bytes,
        profile="p5en",
        nics=case.nics,
        seed=_SEED,
        timeout_s=100.0,
        check_sources=False,
    )
    world.run(_Workload(case, world), case.rounds)
    for rank in range(case.ranks):
        if error := world.error(rank):
            raise RuntimeError(f"rank {rank}: {error}")
    return Measured(
        case.ranks,
        case.rounds,
        config.core_layout(case.ranks, RANKS_PER_NODE).total_bytes,
        world.events(),
        [world.counters(rank) for rank in range(case.ranks)],
    )


def table(results: Sequence[Measured]) -> str:
    """Return the results as text, per rank and round."""
    lines = [
        f"{'ranks':>5} {'nodes':>5} {'writes':>7} {'MB sent':>8} {'rows':>6} {'arena MiB':>9} "
        f"{'events':>7} {'host us':>8} {'host ns/row':>11}"
    ]
    for each in results:
        host_ns = each.mean("host_ns")
        events = each.events / each.ranks / each.rounds
        lines.append(
            f"{each.ranks:>5} {each.ranks // RANKS_PER_NODE:>5} {each.mean('writes'):>7.1f} "
            f"{each.mean('bytes') / 1e6:>8.3f} {each.rows:>6.0f} {each.arena_bytes / 2**20:>9.1f} "
            f"{events:>7.0f} {host_ns / 1e3:>8.0f} {host_ns / each.rows:>11.0f}"
        )
    return "\n".join(lines)


def plot(results: Sequence[Measured], path: Path) -> None:
    """Draw each quantity over the number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "scale"}
    )  # small, and equal for equal results
    import matplotlib.pyplot as plt

    ranks = [each.ranks for each in results]
    quantities = {
        "writes per rank and round": [each.mean("writes") for each in results],
        "MB sent per rank and round": [each.mean("bytes") / 1e6 for each in results],
        "arena of one rank, MiB": [each.arena_bytes / 2**20 for each in results],
        "host time per rank and round, us": [each.mean("host_ns") / 1e3 for each in results],
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    for axis, (name, values) in zip(axes.flat, quantities.items(), strict=True):
        axis.plot(ranks, values, marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(count) for count in ranks])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("ranks (8 per node)")
        axis.set_title(name)
    figure.suptitle("Emulated worlds, one process: counts are exact, times are this machine's")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def update(document: Path, text: str) -> None:
    """Replace the first fenced block of a document."""
    fenced = re.compile(r"^```\n.*?^```$", re.MULTILINE | re.DOTALL)
    document.write_text(fenced.sub(lambda _: f"```\n{text}\n```", document.read_text(), count=1))


def main() -> None:
    """Measure, print, and write ``scale.json`` and ``scale.svg``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="to 1024 ranks: a few minutes and GB")
    parser.add_argument("--update", action="store_true", help=f"write table and plot into {DOCUMENT.name}")
    arguments = parser.parse_args()
    results = [measure(Case(ranks)) for ranks in (FULL_RANKS if arguments.full else RANKS)]
    print(table(results))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "scale.json").write_text(json.dumps([asdict(each) for each in results]))
    plot(results, OUT / PICTURE.name)
    print(f"wrote {OUT / 'scale.json'} and {OUT / PICTURE.name}")
    if arguments.update:
        update(DOCUMENT, table(results))
        plot(results, PICTURE)


if __name__ == "__main__":
    main()
