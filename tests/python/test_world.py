"""Who shares memory with whom: hosts, nodes, rails."""

import threading

import pytest
from thread_world import ThreadBootstrap, outcomes_of_ranks, run_ranks

from vllm_efa_ep import world as world_module
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.world import World, join_world


def _place_on(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rank ``r`` run on the host with the name ``hosts[r]``."""
    names = {f"rank {rank}": host for rank, host in enumerate(hosts)}
    monkeypatch.setattr(world_module, "host_identity", lambda: names[threading.current_thread().name])


def _join(hosts: str, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> list[World]:
    _place_on(hosts, monkeypatch)
    return run_ranks(len(hosts), lambda bootstrap: join_world(bootstrap, {}, ranks_per_node))


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node", "expected"),
    [
        ("a", 0, 1),
        ("aaaa", 0, 4),
        ("aaaa", 2, 2),
        ("aaaa", 1, 1),
        ("aabb", 0, 2),
        ("aaaaaaaabbbb", 0, 4),
        ("aaaaaaaabbbb", 2, 2),
        ("aaaaaabbbbccc", 0, 1),
        ("abab", 0, 1),
        ("aabbbbaa", 0, 2),
    ],
)
def test_nodes_divide_the_runs_of_ranks_on_a_host(
    hosts: str, ranks_per_node: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The greatest common divisor of the runs' lengths, or the divisor of it that was asked for."""
    for rank, world in enumerate(_join(hosts, ranks_per_node, monkeypatch)):
        assert (world.rank, world.size, world.ranks_per_node) == (rank, len(hosts), expected)
        assert world.single_host == (len(set(hosts)) == 1)
        assert world.ranks_on_host == hosts.count(hosts[rank])
        assert world.rank_on_host == hosts[:rank].count(hosts[rank])
        assert {hosts[peer] for peer in world.node_ranks} == {hosts[rank]}


@pytest.mark.parametrize(("ranks_per_node", "expected"), [(4, 4), (0, 2)])
def test_fabric_handles_make_nodes_of_several_hosts(
    ranks_per_node: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only if somebody says how many ranks: nothing else tells where an NVLink domain ends."""
    _place_on("aabb", monkeypatch)
    worlds = run_ranks(4, lambda bootstrap: join_world(bootstrap, {}, ranks_per_node, nodes_span_hosts=True))
    assert {world.ranks_per_node for world in worlds} == {expected}


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node", "divisor"),
    [("aaaa", 3, 4), ("aabb", 4, 2), ("aaaaaaaabbbb", 8, 4), ("ab", 2, 1)],
)
def test_nodes_that_do_not_fit_the_hosts_are_refused(
    hosts: str, ranks_per_node: int, divisor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks say which value would do."""
    _place_on(hosts, monkeypatch)
    outcomes = outcomes_of_ranks(len(hosts), lambda bootstrap: join_world(bootstrap, {}, ranks_per_node))
    for outcome in outcomes:
        assert isinstance(outcome.error, ConfigurationError)
        assert f"EFA_EP_RANKS_PER_NODE={ranks_per_node} does not divide {divisor}" in str(outcome.error)


def test_nodes_and_rails() -> None:
    """Ranks of a node are consecutive; a rail has the ranks with one index."""
    size, ranks_per_node = 12, 4
    everybody = tuple(range(size))
    worlds = [World(rank, size, ranks_per_node, (0,) * size, server_of=everybody) for rank in everybody]
    for rank, world in enumerate(worlds):
        assert world.nodes == 3
        assert (world.node, world.index) == divmod(rank, 4)
        assert rank in world.node_ranks
        assert [worlds[peer].node for peer in world.node_ranks] == [world.node] * 4
        assert [worlds[peer].index for peer in world.rail_peers] == [world.index] * 2
        assert sorted([world.node, *(worlds[peer].node for peer in world.rail_peers)]) == [0, 1, 2]


def test_disagreement_names_both_sides() -> None:
    """Name, ranks and values of what differs."""

    def body(bootstrap: ThreadBootstrap) -> World:
        return join_world(bootstrap, {"alike": 1, "different": bootstrap.rank // 2}, 0)

    for outcome in outcomes_of_ranks(4, body):
        assert isinstance(outcome.error, ConfigurationError)
        assert "different: rank 0 has 0, rank 2 has 1" in str(outcome.error)


def test_two_processes_with_one_rank_are_refused() -> None:
    """Both are named by their place."""

    def body(bootstrap: ThreadBootstrap) -> World:
        return join_world(bootstrap.claiming(min(bootstrap.rank, 1)), {}, 0)

    for outcome in outcomes_of_ranks(3, body):
        assert isinstance(outcome.error, ConfigurationError)
        assert "numbers 1 and 2 of the bootstrap) claim rank 1" in str(outcome.error)


@pytest.mark.parametrize("error", [ConfigurationError("no luck"), OSError("no luck"), MemoryError("no luck")])
def test_a_failing_step_fails_everywhere(error: Exception) -> None:
    """The rank at fault raises its own error, the others one that names it."""

    def contribute(rank: int) -> tuple[None, bytes]:
        if rank == 1:
            raise error
        return None, b""

    outcomes = outcomes_of_ranks(
        3, lambda bootstrap: world_module.agree(bootstrap, "the step", lambda: contribute(bootstrap.rank))
    )
    assert outcomes[1].error is error
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, ConfigurationError)
        assert "the step failed on other ranks" in str(outcomes[rank].error)
        assert f"rank 1: {type(error).__name__}: no luck" in str(outcomes[rank].error)
