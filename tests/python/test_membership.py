"""The survivors agree: one mask per generation, for everybody, whoever is late, silent or back."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_world import Meeting, Rendezvous, ThreadBootstrap, outcomes_of_ranks, run_ranks, settings_of

from vllm_efa_ep import AllToAllConfig
from vllm_efa_ep.errors import ConfigurationError, RankExcludedError, RankTimeoutError
from vllm_efa_ep.generation import build_generation
from vllm_efa_ep.membership import Agreement, Membership
from vllm_efa_ep.stand_in import servers

_SOON_S = 1.0
_AT_ONCE_S = 0.05  # where all that come are there
_NEVER_S = 1000.0


def _come(rendezvous: Rendezvous, generation: int, ranks: Sequence[int]) -> None:
    """Let ranks be there before anybody's window begins: it is over when a thread happens to run."""
    for rank in ranks:
        rendezvous.published[f"here/{generation}/{rank}"] = "0"


def _agree(
    present: Sequence[int], size: int, gone: frozenset[int], window_s: float, returning: dict[int, int]
) -> list[Membership]:
    """Let ``present`` ranks of a full world agree on generation 1."""
    rendezvous = Rendezvous(size)
    first = Membership.first(size, 1)
    _come(rendezvous, 1, present)

    def body(thread: ThreadBootstrap) -> Membership:
        rank = present[thread.rank]
        agreement = Agreement(ThreadBootstrap(rendezvous, rank), window_s)
        return agreement.next(first, lambda: gone, returning)

    return run_ranks(len(present), body)


def test_ranks_known_to_be_gone_are_not_waited_for() -> None:
    """The others agree at once, although the window is endless."""
    for agreed in _agree([0, 2, 3], 4, frozenset({1}), _NEVER_S, {}):
        assert agreed == Membership(1, 1, (0, 2, 3), (0, 0, 0, 0))


def test_silent_ranks_are_left_out_when_the_window_is_over() -> None:
    """Also the one that should have proposed."""
    for agreed in _agree([1, 2], 4, frozenset(), _AT_ONCE_S, {}):
        assert agreed.members == (1, 2)


def test_nobody_lost_is_a_mask_as_well() -> None:
    """A transient fault costs rounds and no ranks."""
    for agreed in _agree([0, 1, 2], 3, frozenset(), _NEVER_S, {}):
        assert agreed.members == (0, 1, 2)


def test_ranks_with_different_masks_do_not_start_together() -> None:
    """Only where somebody destroyed the mask that stood and another took its place do ranks have two."""
    config = AllToAllConfig(64, 4, 2, 8)

    def body(thread: ThreadBootstrap) -> None:
        mask = Membership(1, 1, (0, 1) if thread.rank == 0 else (1,), (0, 0))
        build_generation(config, thread, settings_of(1, timeout_s=_SOON_S), {}, mask, None)

    first, _ = outcomes_of_ranks(2, body)
    assert isinstance(first.error, ConfigurationError)
    assert "about the live ranks: rank 0 has [0, 1], rank 1 has [1]" in str(first.error)


def test_ranks_that_see_different_losses_still_agree() -> None:
    """One knows that rank 1 is gone and one that rank 3 is; what was proposed first holds."""
    rendezvous = Rendezvous(4)
    first = Membership.first(4, 1)
    _come(rendezvous, 1, (0, 2))

    def body(thread: ThreadBootstrap) -> Membership:
        rank, gone = [(0, 1), (2, 3)][thread.rank]
        agreement = Agreement(ThreadBootstrap(rendezvous, rank), _AT_ONCE_S)
        return agreement.next(first, lambda: frozenset({gone}), {})

    assert run_ranks(2, body) == [Membership(1, 1, (0, 2), (0, 0, 0, 0))] * 2


def test_whoever_comes_after_the_mask_is_told() -> None:
    """Its error names the generation and the way back."""
    rendezvous = Rendezvous(2)
    first = Membership.first(2, 1)
    Agreement(ThreadBootstrap(rendezvous, 0), _NEVER_S).next(first, lambda: frozenset({1}), {})
    with pytest.raises(RankExcludedError, match=r"generation 1 is ranks 0; call rejoin\(\)") as excluded:
        Agreement(ThreadBootstrap(rendezvous, 1), _NEVER_S).next(first, frozenset, {})
    assert excluded.value.generation == 1


def _with_two_of_three() -> tuple[Rendezvous, list[Agreement], Membership]:
    rendezvous = Rendezvous(3)
    agreements = [Agreement(ThreadBootstrap(rendezvous, rank), _NEVER_S) for rank in range(3)]
    members = Membership(1, 1, (0, 2), (0, 0, 0))
    rendezvous.published["mask/1"] = members.encode()
    return rendezvous, agreements, members


def test_a_rank_that_comes_back_is_let_in_under_a_new_incarnation() -> None:
    """The members learn of it between two rounds, all the same, and wait for it."""
    _, agreements, members = _with_two_of_three()
    announced = Meeting(2)
    announce = agreements[1]._announce

    def announce_and_meet() -> int:
        incarnation = announce()
        announced.wait()
        return incarnation

    agreements[1]._announce = announce_and_meet  # type: ignore[method-assign]

    def member(rank: int) -> Membership:
        assert agreements[rank].waiting(members, 0) == {}
        if rank == 0:
            announced.wait()
        # The first to ask decides for both.
        returning = agreements[rank].waiting(members, 1) if rank == 0 else {1: 1}
        assert returning == {1: 1}
        return agreements[rank].next(members, frozenset, returning)

    def body(thread: ThreadBootstrap) -> Membership:
        return agreements[1].come_back(_NEVER_S) if thread.rank == 1 else member(thread.rank)

    assert run_ranks(3, body) == [Membership(2, 1, (0, 1, 2), (0, 1, 0))] * 3


def test_all_members_hear_the_same_about_who_waits() -> None:
    """Whoever asks first decides, also for those who ask after the announcement."""
    rendezvous, agreements, members = _with_two_of_three()
    assert agreements[0].waiting(members, 0) == {}
    rendezvous.published["returned/1"] = "1"
    assert agreements[2].waiting(members, 0) == {}
    assert [each.waiting(members, 1) for each in (agreements[2], agreements[0])] == [{1: 1}, {1: 1}]


def test_a_rank_that_announced_itself_and_died_is_waited_for_once() -> None:
    """The next mask knows its incarnation, so nobody waits for it again."""
    rendezvous, agreements, members = _with_two_of_three()
    rendezvous.published["returned/1"] = "1"
    _come(rendezvous, 2, (0, 2))
    for agreement in agreements:
        agreement._window_s = _AT_ONCE_S

    def body(thread: ThreadBootstrap) -> Membership:
        return agreements[(0, 2)[thread.rank]].next(members, frozenset, {1: 1})

    agreed = run_ranks(2, body)
    assert agreed == [Membership(2, 1, (0, 2), (0, 1, 0))] * 2
    assert agreements[0].waiting(agreed[0], 0) == {}


def test_every_return_is_an_incarnation_of_its_own() -> None:
    """Also of processes that know nothing of each other."""
    rendezvous = Rendezvous(2)
    numbers = [Agreement(ThreadBootstrap(rendezvous, 1), _SOON_S)._announce() for _ in range(3)]
    assert numbers == [1, 2, 3]


def test_an_old_incarnation_is_not_taken_for_the_new_one() -> None:
    """A thawed process whose place is taken again is excluded, although its rank is a member."""
    rendezvous = Rendezvous(2)
    rendezvous.published["mask/1"] = Membership(1, 1, (0, 1), (0, 1)).encode()
    with pytest.raises(RankExcludedError):
        Agreement(ThreadBootstrap(rendezvous, 1), _NEVER_S).next(Membership.first(2, 1), frozenset, {})


def test_nobody_lets_the_rank_in() -> None:
    """It says so after its deadline."""
    with pytest.raises(RankTimeoutError, match=rf"rank 1 waited {_SOON_S:g} s to be let in.*rejoin\(\)"):
        Agreement(ThreadBootstrap(Rendezvous(2), 1), _NEVER_S).come_back(_SOON_S)


@given(
    nodes=st.integers(1, 6),
    ranks_per_node=st.integers(1, 8),
    keep=st.data(),
)
def test_positions_of_lost_ranks_are_served(nodes: int, ranks_per_node: int, keep: st.DataObject) -> None:
    """By live ranks; a node's all on one node, their own if it has a live rank; as evenly as that allows."""
    size = nodes * ranks_per_node
    members = sorted(keep.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    server_of = servers(size, ranks_per_node, members)

    def node_of(rank: int) -> int:
        return rank // ranks_per_node

    assert set(server_of) == set(members)
    assert all(server_of[member] == member for member in members)
    live_nodes = {node_of(member) for member in members}
    for node in range(nodes):
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        helpers = {node_of(server_of[rank]) for rank in ranks}
        assert len(helpers) == 1
        assert node not in live_nodes or helpers == {node}
    for node in live_nodes:
        guests = [
            sum(server_of[rank] == member and node_of(rank) == node for rank in range(size))
            for member in members
            if node_of(member) == node
        ]
        assert max(guests) - min(guests) <= 1
