"""Worlds of production devices and proxies on an emulated network, checked by the oracle as they run."""

import ctypes
import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from oracle import Batch, check_combined, check_dispatched, compute_experts

from benchmarks.emulated_module import emulated
from vllm_efa_ep import AllToAllConfig, Dispatched
from vllm_efa_ep.dispatched import OutputBuffers
from vllm_efa_ep.placement import linear_placement, round_robin_placement
from vllm_efa_ep.rank_memory import HostMemory

# Far above any round's virtual time: a world that stands still ends there, at once in real time.
TIMEOUT_S = 100.0
# Up to 32 products of a value, a scale and an expert's factor add up to at most 256: exact in every type.
_EXACT_VALUES = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
_EXACT_SCALES = torch.tensor([1.0, 2.0])


@dataclass(frozen=True)
class Scene:
    """A world, its network and what it does for some rounds. Nothing else decides a run."""

    nodes: int = 2
    ranks_per_node: int = 1
    experts: int = 4
    placement: str = "linear"  # or round_robin, random
    top_k: int = 2
    max_tokens: int = 4
    hidden: int = 16
    dtype: str = "bfloat16"
    combine_dtype: str = "bfloat16"
    scale_columns: int = 0
    layout: str = "per_token"
    channels: int = 1
    routing: str = "uniform"  # one of ROUTINGS
    rounds: int = 1
    payload_columns: int | None = None  # of packed payloads
    in_place: bool = False  # activations, and results if they can be, lie in the arena
    exact: bool = False  # inputs whose sums every type holds
    per_slot: bool = False
    weighted: bool = True  # the experts apply the weights
    signal_policy: str = "counted"
    chunk_bytes: int = 256 * 1024
    nics: int = 1
    profile: str = "hostile"
    seed: int = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def config(self) -> AllToAllConfig:
        """The configuration of the same world on a real network."""
        return AllToAllConfig(
            hidden_size=self.hidden,
            num_experts=self.experts,
            top_k=self.top_k,
            max_tokens_per_rank=self.max_tokens,
            dtype=getattr(torch, self.dtype),
            combine_dtype=getattr(torch, self.combine_dtype),
            payload_columns=self.payload_columns,
            scale_columns=self.scale_columns,
            layout=self.layout,  # type: ignore[arg-type]
            channels=self.channels,
            expert_to_rank=self._owners(),
        )

    def replay(self) -> str:
        """Return the command that runs this scene and no other."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        test = "tests/python/test_emulated_worlds.py -k chosen"
        return f"TEST_SCENE='{json.dumps(changed)}' python -m pytest {test}"

    def batches(self, channel: int, round_number: int) -> list[Batch]:
        """Return every rank's input of a round."""
        return [self._batch(channel, round_number, rank) for rank in range(self.size)]

    def _owners(self) -> tuple[int, ...]:
        if self.placement == "linear":
            return tuple(linear_placement(self.experts, self.size))
        if self.placement == "round_robin":
            return tuple(round_robin_placement(self.experts, self.size))
        random = torch.Generator().manual_seed(self.seed)
        return tuple(torch.randint(0, self.size, (self.experts,), generator=random).tolist())

    def _batch(self, channel: int, round_number: int, rank: int) -> Batch:
        random = torch.Generator().manual_seed(hash((self.seed, channel, round_number, rank)) % 2**63)
        config = self.config
        # Often none and often all: the ends of the range are where the protocol's cases differ.
        tokens = int(torch.randint(-1, self.max_tokens + 2, (), generator=random))
        tokens = min(max(tokens, 0), self.max_tokens)
        if self.routing == "empty":
            tokens = 0
        ids = ROUTINGS[self.routing](self, tokens, random)
        x = self._values((tokens, config.columns), _EXACT_VALUES, random)
        x = (x.abs() if config.dtype == torch.uint8 else x).to(config.dtype)
        weights = self._values((tokens, self.top_k), torch.ones(1), random)
        scales = self._values((tokens, self.scale_columns), _EXACT_SCALES, random)
        if rank % 2:
            ids = ids.int()
        return Batch(x, ids, weights, scales if self.scale_columns else None)

    def _values(self, shape: tuple[int, int], exact: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        if self.exact:
            return exact[torch.randint(0, len(exact), shape, generator=random)]
        return torch.randn(shape, generator=random)


def _uniform(scene: Scene, tokens: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(0, scene.experts, (tokens, scene.top_k), generator=random)


def _zipf(scene: Scene, tokens: int, random: torch.Generator) -> torch.Tensor:
    popularity = 1.0 / torch.arange(1, scene.experts + 1) ** 1.2
    draws = torch.multinomial(popularity, max(tokens, 1) * scene.top_k, replacement=True, generator=random)
    return draws.reshape(-1, scene.top_k)[:tokens]


def _one_hot_expert(scene: Scene, tokens: int, _random: torch.Generator) -> torch.Tensor:
    return torch.full((tokens, scene.top_k), scene.seed % scene.experts)


def _sparse(scene: Scene, tokens: int, random: torch.Generator) -> torch.Tensor:
    ids = _uniform(scene, tokens, random)
    ids[torch.rand(ids.shape, generator=random) < 0.7] = -1
    return ids


def _dropped(scene: Scene, tokens: int, _random: torch.Generator) -> torch.Tensor:
    return torch.full((tokens, scene.top_k), -1)


def _mixed(scene: Scene, tokens: int, random: torch.Generator) -> torch.Tensor:
    kinds = [_uniform, _zipf, _one_hot_expert, _sparse, _dropped]
    return kinds[int(torch.randint(0, len(kinds), (), generator=random))](scene, tokens, random)


ROUTINGS = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_hot_expert": _one_hot_expert,
    "sparse": _sparse,
    "dropped": _dropped,
    "empty": _uniform,
    "mixed": _mixed,
}


class CheckedWorkload:
    """What the ranks of a scene compute. An ``AssertionError`` ends the rank whose result is wrong."""

    def __init__(self, scene: Scene, world: Any) -> None:
        """Prepare for all ranks and channels of an emulated world."""
        self.scene = scene
        self._world = world
        self.config = scene.config
        self._dispatch_row = self.config.core_layout(scene.size, scene.ranks_per_node).dispatch_row_bytes
        self.per_slot = scene.per_slot or scene.layout == "per_expert"
        # [M, H] is always weighted by the experts.
        self.weighted_by_experts = scene.weighted or not self.per_slot
        placement = self.config.placement(scene.size)
        self.local_experts: list[list[int]] = [[] for _ in range(scene.size)]
        for expert, owner in enumerate(placement):
            self.local_experts[owner].append(expert)
        self._received: dict[tuple[int, int], Dispatched] = {}
        self._kept: dict[tuple[int, int], torch.Tensor] = {}  # what a rank's channel passed last
        self.batches = functools.cache(scene.batches)  # as the oracle sees them
        self.sent = self.batches  # as the ranks pass them

    def tokens(self, rank: int, channel: int, round_number: int) -> tuple[int, int, int, int, bool, int, int]:
        """Return x, its stride, scales, ids (are they 64 bits wide?), weights; then the tokens."""
        own = self.sent(channel, round_number)[rank]
        x, stride = own.x.data_ptr(), own.x.shape[1] * own.x.itemsize
        if self.scene.in_place:
            x = self._world.activations(rank, channel)
            stride = self._dispatch_row
            for token, row in enumerate(own.x.contiguous().view(torch.uint8).numpy()):
                ctypes.memmove(x + token * stride, row.ctypes.data, row.nbytes)
        return (
            x,
            stride,
            0 if own.scales is None else own.scales.data_ptr(),
            own.topk_ids.data_ptr(),
            own.topk_ids.dtype == torch.int64,
            own.topk_weights.data_ptr(),
            own.tokens,
        )

    def receive(self, rank: int, channel: int, _round_number: int, rows: int) -> tuple[int, ...]:
        """Return addresses for ``rows`` rows."""
        capacity = self.scene.size * self.scene.max_tokens
        buffers = OutputBuffers(self.config, len(self.local_experts[rank]), capacity, HostMemory())
        if rows > buffers.room:
            buffers.grow(rows)
        self._received[rank, channel] = buffers.views(rows)
        return tuple(buffers.addresses)

    def results(self, rank: int, channel: int, round_number: int) -> tuple[int, bool, bool]:
        """Check what arrived, and return the experts' answer."""
        got = self._received[rank, channel]
        experts = self.local_experts[rank]
        check_dispatched(self.config, self.batches(channel, round_number), experts, got)
        output = compute_experts(self.config, experts, got, self.per_slot, self.weighted_by_experts)
        self._kept[rank, channel] = output = output.contiguous()
        if self.scene.in_place and output.dim() == 2:
            address = self._world.results(rank, channel)
            ctypes.memmove(address, output.data_ptr(), output.nbytes)
            return address, False, self.weighted_by_experts
        return output.data_ptr(), got.x.dim() == 2 and self.per_slot, self.weighted_by_experts

    def output(self, rank: int, channel: int, round_number: int) -> int:
        """Return the address for the round's result."""
        tokens = self.batches(channel, round_number)[rank].tokens
        out = torch.full((tokens, self.config.hidden_size), torch.nan, dtype=self.config.combine_dtype)
        self._kept[rank, channel] = out
        return out.data_ptr()

    def finished(self, rank: int, channel: int, round_number: int) -> None:
        """Check the round's result."""
        weights_count = self.scene.layout == "per_token" or not self.weighted_by_experts
        own = self.batches(channel, round_number)[rank]
        check_combined(self.config, own, weights_count, self.scene.exact, self._kept[rank, channel])


def world_of(scene: Scene, check_sources: bool = True) -> Any:
    """Return a scene's world, to be run with a workload."""
    config = scene.config
    config.check(scene.size, scene.ranks_per_node)
    return emulated().World(
        world=scene.size,
        ranks_per_node=scene.ranks_per_node,
        top_k=scene.top_k,
        payload_bytes=config.columns * config.dtype.itemsize,
        scale_bytes=4 * scene.scale_columns,
        combine_bytes=scene.hidden * config.combine_dtype.itemsize,
        max_tokens=scene.max_tokens,
        channels=scene.channels,
        expert_owner=list(config.placement(scene.size)),
        combine_type=scene.combine_dtype,
        per_expert=scene.layout == "per_expert",
        signal_policy=scene.signal_policy,
        chunk_bytes=scene.chunk_bytes,
        profile=scene.profile,
        nics=scene.nics,
        seed=scene.seed,
        timeout_s=TIMEOUT_S,
        check_sources=check_sources,
    )


def play(scene: Scene) -> None:
    """Run a scene. Raises ``AssertionError`` with the first errors and the command that replays them."""
    world = world_of(scene)
    world.run(CheckedWorkload(scene, world), scene.rounds)
    wrong = []
    for rank in range(scene.size):
        if error := world.error(rank):
            wrong.append(f"rank {rank}: {error}")
        elif changed := world.changed_sources(rank):
            wrong.append(f"rank {rank} changed the source of {changed} writes before their completion")
        elif any(world.finished_rounds(rank, channel) != scene.rounds for channel in range(scene.channels)):
            wrong.append(f"rank {rank} did not finish its {scene.rounds} rounds")
    shown = "\n".join(wrong[:3])
    assert not wrong, f"{len(wrong)} of {scene.size} ranks failed:\n{shown}\nreplay: {scene.replay()}"
