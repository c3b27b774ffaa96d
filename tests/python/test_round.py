"""Whole rounds against the oracle, over random worlds, configurations, placements and routings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import placed_rounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Batch, check_combined, check_dispatched, compute_experts
from placed_rounds import play_at_odd_addresses, play_over_activations
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Dispatched, Handle
from vllm_efa_ep.config import Settings
from vllm_efa_ep.placement import round_robin_placement

# Two of these add up, 32 times over, to at most 256: exact in every type, in every order.
_EXACT_VALUES = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
_EXACT_FACTORS = torch.tensor([1.0, 2.0])

_Tensors = TypeVar("_Tensors", Batch, Dispatched)


def _fields(tensors: Batch | Dispatched) -> dict[str, Any]:
    return tensors._asdict() if isinstance(tensors, Dispatched) else vars(tensors)


@dataclass(frozen=True)
class Scene:
    """A world and what it does for some rounds."""

    nodes: int
    ranks_per_node: int
    config: AllToAllConfig
    rounds: int
    seed: int
    exact: bool
    per_slot: bool
    weighted: bool  # the experts apply the weights
    in_place: bool = False  # activations, and [M, H] results, are produced in shared memory

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    def batches(self, round_number: int, channel: int) -> list[Batch]:
        """Return every rank's input of a round; the same on all ranks."""
        return [self._batch(round_number, channel, rank) for rank in range(self.size)]

    def _batch(self, round_number: int, channel: int, rank: int) -> Batch:
        random = torch.Generator().manual_seed(hash((self.seed, round_number, channel, rank)) % 2**63)
        config = self.config
        # Often none and often all: the ends of the range are where the protocol's cases differ.
        tokens = int(torch.randint(-2, config.max_tokens_per_rank + 3, (), generator=random))
        tokens = min(max(tokens, 0), config.max_tokens_per_rank)
        ids = torch.randint(0, config.num_experts, (tokens, config.top_k), generator=random)
        dropped = torch.rand(tokens, config.top_k, generator=random) < torch.rand((), generator=random) - 0.2
        ids[dropped] = -1
        if torch.rand((), generator=random) < 0.5:
            ids = ids.int()
        x = self._values((tokens, config.columns), _EXACT_VALUES, random)
        if config.dtype == torch.uint8:
            x = x.abs() if self.exact else x.abs() * 50
        return Batch(
            x.to(config.dtype),
            ids,
            self._values((tokens, config.top_k), torch.ones(1), random),
            self._values((tokens, config.scale_columns), _EXACT_FACTORS, random)
            if config.scale_columns
            else None,
        )

    def _values(self, shape: tuple[int, ...], exact: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        if self.exact:
            return exact[torch.randint(0, len(exact), shape, generator=random)]
        return torch.randn(shape, generator=random)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Draw worlds of up to 6 ranks."""
    nodes, ranks_per_node = draw(
        st.sampled_from([(n, r) for n in range(1, 7) for r in range(1, 7) if n * r <= 6]).filter(bool)
    )
    size = nodes * ranks_per_node
    experts = draw(st.integers(1, 24))
    placement = draw(
        st.one_of(
            st.none(),
            st.just(round_robin_placement(experts, size)),
            st.tuples(*[st.integers(0, size - 1)] * experts),
        )
    )
    combine_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    dtype = draw(
        st.sampled_from([combine_dtype, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8])
    )
    hidden = 16 * draw(st.sampled_from([1, 2, 3, 5, 80]))
    packed = dtype == torch.uint8
    config = AllToAllConfig(
        hidden_size=hidden,
        num_experts=experts,
        top_k=draw(st.sampled_from([1, 2, 3, 8, 31, 32])),
        max_tokens_per_rank=draw(st.sampled_from([1, 2, 5, 12, 40])),
        dtype=dtype,
        combine_dtype=combine_dtype,
        payload_columns=16 * draw(st.integers(1, 4)) if packed else None,
        scale_columns=draw(st.integers(1, 5)) if dtype.itemsize == 1 else 0,
        layout=draw(st.sampled_from(["per_token", "per_expert"])),
        channels=draw(st.integers(1, 2)),
        expert_to_rank=placement,
    )
    return Scene(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        config=config,
        rounds=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32 - 1)),
        exact=draw(st.booleans()),
        per_slot=draw(st.booleans()),
        weighted=draw(st.booleans()),
        in_place=draw(st.booleans()),
    )


def play(scene: Scene, world_settings: Settings, check: bool = True) -> list[list[torch.Tensor]]:
    """Run the scene and return, for every rank, the results of its rounds."""
    body = body_of(scene, check)
    return run_world(scene.config, scene.size, world_settings, body)


def body_of(
    scene: Scene, check: bool = True, device: str = "cpu"
) -> Callable[[AllToAll], list[torch.Tensor]]:
    """Return what a rank of the scene does, with its tensors on ``device``; it returns its results.

    With two channels, both rounds are in flight at once.
    """
    config = scene.config
    per_slot = scene.per_slot or config.layout == "per_expert"
    # [M, H] is always weighted by the experts; rows of the per_expert layout carry no weights to apply.
    weighted_by_experts = scene.weighted or not per_slot

    def on(where: str, tensors: _Tensors) -> _Tensors:
        moved = {name: tensor.to(where) for name, tensor in _fields(tensors).items() if tensor is not None}
        return replace(tensors, **moved) if isinstance(tensors, Batch) else tensors._replace(**moved)

    def send(all_to_all: AllToAll, batch: Batch, channel: int) -> Handle:
        own = on(device, batch)
        x = all_to_all.activations(channel)[: len(own.x)].copy_(own.x) if scene.in_place else own.x
        return all_to_all.dispatch_send(x, own.topk_ids, own.topk_weights, own.scales, channel)

    def body(all_to_all: AllToAll) -> list[torch.Tensor]:
        results = []
        rank = all_to_all.rank
        for round_number in range(scene.rounds):
            inputs = [scene.batches(round_number, channel) for channel in range(config.channels)]
            handles = [send(all_to_all, batches[rank], channel) for channel, batches in enumerate(inputs)]
            for batches, handle in zip(inputs, handles, strict=True):
                got = on("cpu", all_to_all.dispatch_recv(handle))
                if check:
                    check_dispatched(config, batches, all_to_all.local_experts, got)
                output = compute_experts(config, all_to_all.local_experts, got, per_slot, weighted_by_experts)
                output = output.to(device)
                if scene.in_place and not per_slot:
                    output = all_to_all.expert_output(handle).copy_(output)
                all_to_all.combine_send(output, handle, weighted_by_experts)
            for batches, handle in zip(inputs, handles, strict=True):
                result = all_to_all.combine_recv(handle).cpu()
                if check:
                    weights_count = config.layout == "per_token" or not weighted_by_experts
                    check_combined(config, batches[rank], weights_count, scene.exact, result)
                results.append(result)
        return results

    return body


@settings(max_examples=250)
@given(scene=scenes(), chunk_bytes=st.sampled_from([1, 100, 2000, 256 * 1024]), nics=st.integers(1, 3))
def test_rounds_match_the_oracle(scene: Scene, chunk_bytes: int, nics: int) -> None:
    """What arrives is exact; what comes back is exact where arithmetic is, else within the derived bound."""
    play(scene, settings_of(scene.ranks_per_node, chunk_bytes=chunk_bytes, nics_per_rank=nics))


@settings(max_examples=12)
@given(
    scene=scenes().filter(lambda scene: scene.nodes > 1),
    chunk_bytes=st.integers(1, 3000),
    nics=st.integers(1, 3),
)
def test_the_network_does_not_change_a_bit(scene: Scene, chunk_bytes: int, nics: int) -> None:
    """Chunk size, number of NICs and provider leave no trace in the results."""
    inexact = replace(scene, exact=False)
    reference = play(inexact, settings_of(scene.ranks_per_node), check=False)
    for provider in ("tcp", "tcp;ofi_rxm"):
        changed = settings_of(
            scene.ranks_per_node, chunk_bytes=chunk_bytes, nics_per_rank=nics, provider=provider
        )
        for expected, got in zip(reference, play(inexact, changed, check=False), strict=True):
            for one, other in zip(expected, got, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=12)
@given(scene=scenes())
def test_producing_in_place_does_not_change_a_bit(scene: Scene) -> None:
    """Shared memory or ordinary tensors: the results are the same."""
    inexact = replace(scene, exact=False)
    results = [
        play(replace(inexact, in_place=in_place), settings_of(scene.ranks_per_node, chunk_bytes=1000), False)
        for in_place in (False, True)
    ]
    for expected, got in zip(*results, strict=True):
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(4, 4), (12, 1), (1, 12), (5, 3)])
@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_larger_worlds_match_the_oracle(nodes: int, ranks_per_node: int, layout: str) -> None:
    """More ranks than the random worlds have, with experts on some of them only."""
    size = nodes * ranks_per_node
    config = AllToAllConfig(
        64,
        2 * size,
        6,
        16,
        layout=layout,
        expert_to_rank=tuple(expert * 5 % (size - 1) for expert in range(2 * size)),
    )
    scene = Scene(
        nodes, ranks_per_node, config, rounds=2, seed=size, exact=False, per_slot=False, weighted=True
    )
    play(scene, settings_of(ranks_per_node, chunk_bytes=1000))


def test_rounds_go_on_for_long() -> None:
    """Past the 64 rounds that an immediate's tag can tell apart, and past any queue's first turn."""
    config = AllToAllConfig(16, 8, 2, 2, channels=2)
    scene = Scene(2, 2, config, rounds=200, seed=1, exact=False, per_slot=False, weighted=True)
    play(scene, settings_of(2, ring_commands=16, chunk_bytes=1))


@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 2), (4, 2), (2, 1)])
def test_inputs_may_lie_anywhere(size: int, ranks_per_node: int) -> None:
    """Also where dispatch writes (on fibers: cuda_on_fibers.py)."""

    def body(all_to_all: AllToAll) -> None:
        play_over_activations(all_to_all)
        play_at_odd_addresses(all_to_all)

    run_world(placed_rounds.config_of(size, "cpu"), size, settings_of(ranks_per_node), body)


def test_inputs_need_not_be_contiguous() -> None:
    """Views are copied where their rows do not lie one behind the other."""
    config = AllToAllConfig(16, 4, 2, 4)
    wide = Batch(
        torch.randn(32, 8, generator=torch.Generator().manual_seed(3)).bfloat16(),
        torch.tensor([[0, 3, 1, 2]] * 4),
        torch.rand(4, 4, generator=torch.Generator().manual_seed(4)),
        None,
    )
    views = Batch(wide.x.T[::2, ::2], wide.topk_ids[:, ::2], wide.topk_weights[:, 1::2], None)

    def body(all_to_all: AllToAll) -> None:
        got, handle = all_to_all.dispatch(views.x, views.topk_ids, views.topk_weights)
        check_dispatched(config, [views] * 2, all_to_all.local_experts, got)
        output = compute_experts(config, all_to_all.local_experts, got, per_slot=True, weighted=False)
        strided = torch.empty(16, 2, output.shape[0], dtype=output.dtype).permute(2, 1, 0).copy_(output)
        check_combined(config, views, True, False, all_to_all.combine(strided, handle))

    run_world(config, 2, settings_of(1), body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_sums_are_rounded_to_nearest(nodes: int, ranks_per_node: int, dtype: torch.dtype) -> None:
    """Two experts, every value of a 16-bit type: float32 sums, rounded once per rank that adds."""
    size, tokens, hidden = nodes * ranks_per_node, 64, 1024
    config = AllToAllConfig(hidden, 4, 2, tokens, dtype=dtype, combine_dtype=dtype)
    random = torch.Generator().manual_seed(size)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(tokens, hidden)
    other_values = torch.randn(tokens, hidden, generator=random).to(dtype)
    ids = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=random)

    placement = torch.tensor(config.placement(size))
    terms = [weights[:, slot, None] * x.float() for slot, x in enumerate((values, other_values))]
    one_owner = (placement[ids[:, 0]] == placement[ids[:, 1]])[:, None]
    rounded_first = [term.to(dtype).float() for term in terms]
    expected = torch.where(one_owner, terms[0] + terms[1], rounded_first[0] + rounded_first[1]).to(dtype)

    def body(all_to_all: AllToAll) -> None:
        got, handle = all_to_all.dispatch(values, ids, weights)
        # Every rank dispatches the same tokens; which of them a row is, its ids and weights tell.
        assert got.topk_weights is not None
        token = (got.topk_weights[:, None] == weights).all(-1).int().argmax(1)
        result = all_to_all.combine(torch.stack([values[token], other_values[token]], dim=1), handle)
        same = (result == expected) | (result.isnan() & expected.isnan())
        assert bool(same.all()), f"{int((~same).sum())} results differ"

    run_world(config, size, settings_of(ranks_per_node), body)
