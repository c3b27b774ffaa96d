"""The four halves one by one: what waits, what does not, and how long memory stays what it is."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracle import Batch, check_combined, check_dispatched, compute_experts
from thread_world import DEADLINE_S, Meeting, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Dispatched, Handle

_WORLDS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]
_several_ranks = pytest.mark.parametrize(("nodes", "ranks_per_node"), _WORLDS[1:])
_all_worlds = pytest.mark.parametrize(("nodes", "ranks_per_node"), _WORLDS)


def _config(**changes: object) -> AllToAllConfig:
    values = {"hidden_size": 64, "num_experts": 12, "top_k": 3, "max_tokens_per_rank": 20, **changes}
    return AllToAllConfig(**values)  # type: ignore[arg-type]


def _batches(config: AllToAllConfig, size: int, seed: int) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)

    def batch(tokens: int) -> Batch:
        return Batch(
            torch.randn(tokens, config.columns, generator=random).to(config.dtype),
            torch.randint(-1, config.num_experts, (tokens, config.top_k), generator=random),
            torch.rand(tokens, config.top_k, generator=random),
            torch.rand(tokens, config.scale_columns, generator=random) if config.scale_columns else None,
        )

    return [batch(config.max_tokens_per_rank - rank) for rank in range(size)]


def _compute(all_to_all: AllToAll, got: Dispatched) -> torch.Tensor:
    return compute_experts(all_to_all.config, all_to_all.local_experts, got, per_slot=False, weighted=True)


def _rank_0_first(rank: int, returned: threading.Event, half: Callable[[], object]) -> None:
    """Let the other ranks enter a half only after it has returned on rank 0."""
    if rank == 0:
        half()
        returned.set()
    else:
        assert returned.wait(DEADLINE_S), "rank 0 did not return from a send half"
        half()


@_several_ranks
def test_send_halves_wait_for_nobody(nodes: int, ranks_per_node: int) -> None:
    """They return before any other rank has entered the same half, in the first round and later."""
    config, size = _config(), nodes * ranks_per_node
    rounds = [_batches(config, size, number) for number in range(3)]
    dispatched, combined = ([threading.Event() for _ in rounds] for _ in range(2))
    meeting = Meeting(size)

    def body(all_to_all: AllToAll) -> None:
        rank = all_to_all.rank
        for number, batches in enumerate(rounds):
            own = batches[rank]
            handles: list[Handle] = []
            send = partial(all_to_all.dispatch_send, own.x, own.topk_ids, own.topk_weights)
            meeting.wait()
            _rank_0_first(rank, dispatched[number], lambda send=send, handles=handles: handles.append(send()))
            got = all_to_all.dispatch_recv(handles[0])
            check_dispatched(config, batches, all_to_all.local_experts, got)
            output = _compute(all_to_all, got)
            meeting.wait()
            _rank_0_first(rank, combined[number], partial(all_to_all.combine_send, output, handles[0]))
            check_combined(config, own, True, False, all_to_all.combine_recv(handles[0]))

    run_world(config, size, settings_of(ranks_per_node), body)


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 3), (2, 1), (3, 1)])
def test_data_flies_while_a_rank_computes(nodes: int, ranks_per_node: int) -> None:
    """Others get a rank's rows and results while that rank is between its halves."""
    config, size = _config(), nodes * ranks_per_node
    got_rows, got_results = Meeting(size), Meeting(size)

    def body(all_to_all: AllToAll) -> None:
        batches = _batches(config, size, 1)
        own = batches[all_to_all.rank]
        handle = all_to_all.dispatch_send(own.x, own.topk_ids, own.topk_weights)
        if all_to_all.rank == 0:
            got_rows.wait()
        got = all_to_all.dispatch_recv(handle)
        check_dispatched(config, batches, all_to_all.local_experts, got)
        if all_to_all.rank != 0:
            got_rows.wait()
        all_to_all.combine_send(_compute(all_to_all, got), handle)
        if all_to_all.rank == 0:
            got_results.wait()
        check_combined(config, own, True, False, all_to_all.combine_recv(handle))
        if all_to_all.rank != 0:
            got_results.wait()

    run_world(config, size, settings_of(ranks_per_node), body)


@_all_worlds
@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_inputs_are_free_once_a_send_half_returns(nodes: int, ranks_per_node: int, layout: str) -> None:
    """Everything handed to a send half is overwritten right after it."""
    config, size = (
        _config(layout=layout, scale_columns=2, combine_dtype=torch.float32),
        nodes * ranks_per_node,
    )

    def body(all_to_all: AllToAll) -> None:
        for number in range(3):
            batches = _batches(config, size, number)
            own = batches[all_to_all.rank]
            assert own.scales is not None
            inputs = [own.x.clone(), own.topk_ids.clone(), own.topk_weights.clone(), own.scales.clone()]
            handle = all_to_all.dispatch_send(*inputs)
            for tensor in inputs:
                tensor.fill_(0)
            got = all_to_all.dispatch_recv(handle)
            check_dispatched(config, batches, all_to_all.local_experts, got)
            output = _compute(all_to_all, got)
            all_to_all.combine_send(output, handle)
            output.fill_(torch.nan)
            check_combined(config, own, True, False, all_to_all.combine_recv(handle))

    run_world(config, size, settings_of(ranks_per_node), body)


@_all_worlds
def test_the_result_may_overwrite_the_expert_output(nodes: int, ranks_per_node: int) -> None:
    """``out`` may lie in the memory of ``expert_output``."""
    config, size = _config(), nodes * ranks_per_node

    def body(all_to_all: AllToAll) -> None:
        for number in range(3):
            batches = _batches(config, size, number)
            own = batches[all_to_all.rank]
            got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights)
            rows = got.x.shape[0]
            memory = torch.zeros(max(rows, own.tokens), config.hidden_size, dtype=config.combine_dtype)
            memory[:rows] = _compute(all_to_all, got)
            result = all_to_all.combine(memory[:rows], handle, out=memory[: own.tokens])
            assert result.data_ptr() == memory.data_ptr()
            check_combined(config, own, True, False, result)

    run_world(config, size, settings_of(ranks_per_node), body)


@_all_worlds
@pytest.mark.parametrize("layout", ["per_token", "per_expert"])
def test_received_rows_stay_until_the_next_are_received(nodes: int, ranks_per_node: int, layout: str) -> None:
    """Neither combine nor the next ``dispatch_send`` touches them, nor does the other channel."""
    config, size = _config(layout=layout, channels=2), nodes * ranks_per_node

    def body(all_to_all: AllToAll) -> None:
        rounds = [_batches(config, size, number) for number in range(3)]
        first, second, other = (batches[all_to_all.rank] for batches in rounds)
        got, handle = all_to_all.dispatch(first.x, first.topk_ids, first.topk_weights)
        all_to_all.combine(_compute(all_to_all, got), handle)
        got_other, handle_other = all_to_all.dispatch(other.x, other.topk_ids, other.topk_weights, channel=1)
        next_handle = all_to_all.dispatch_send(second.x, second.topk_ids, second.topk_weights)
        check_dispatched(config, rounds[0], all_to_all.local_experts, got)
        got = all_to_all.dispatch_recv(next_handle)
        check_dispatched(config, rounds[1], all_to_all.local_experts, got)
        check_dispatched(config, rounds[2], all_to_all.local_experts, got_other)
        all_to_all.combine(_compute(all_to_all, got), next_handle)
        all_to_all.combine(_compute(all_to_all, got_other), handle_other)

    run_world(config, size, settings_of(ranks_per_node), body)


@_all_worlds
def test_two_channels_interleave_in_one_thread(nodes: int, ranks_per_node: int) -> None:
    """As dual-batch overlap does: one channel's data flies while the other one's experts compute."""
    config, size = _config(channels=2), nodes * ranks_per_node

    def body(all_to_all: AllToAll) -> None:
        rounds = [_batches(config, size, number) for number in range(12)]
        handles = {}
        outputs = {}

        def own(number: int) -> Batch:
            return rounds[number][all_to_all.rank]

        def finish(number: int) -> None:
            check_combined(config, own(number), True, False, all_to_all.combine_recv(handles[number]))

        for number in range(len(rounds)):
            if number >= 2:
                finish(number - 2)
            inputs = own(number)
            handles[number] = all_to_all.dispatch_send(
                inputs.x, inputs.topk_ids, inputs.topk_weights, channel=number % 2
            )
            if number >= 1:
                all_to_all.combine_send(outputs[number - 1], handles[number - 1])
            got = all_to_all.dispatch_recv(handles[number])
            check_dispatched(config, rounds[number], all_to_all.local_experts, got)
            outputs[number] = _compute(all_to_all, got)
        all_to_all.combine_send(outputs[len(rounds) - 1], handles[len(rounds) - 1])
        finish(len(rounds) - 2)
        finish(len(rounds) - 1)

    run_world(config, size, settings_of(ranks_per_node), body)


@_all_worlds
def test_two_channels_run_in_two_threads(nodes: int, ranks_per_node: int) -> None:
    """Each thread plays its own rounds on its channel, at its own pace."""
    config, size = _config(channels=2), nodes * ranks_per_node

    def play(all_to_all: AllToAll, channel: int, failures: list[BaseException]) -> None:
        try:
            for number in range(10):
                batches = _batches(config, size, 100 * channel + number)
                own = batches[all_to_all.rank]
                got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights, channel=channel)
                check_dispatched(config, batches, all_to_all.local_experts, got)
                result = all_to_all.combine(_compute(all_to_all, got), handle)
                check_combined(config, own, True, False, result)
        except BaseException as error:
            failures.append(error)

    def body(all_to_all: AllToAll) -> None:
        failures: list[BaseException] = []
        threads = [threading.Thread(target=play, args=(all_to_all, channel, failures)) for channel in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        if failures:
            raise failures[0]
        assert all_to_all.stats().rounds == 20

    run_world(config, size, settings_of(ranks_per_node), body)
