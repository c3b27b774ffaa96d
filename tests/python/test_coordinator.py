"""The place where ranks meet without a process group: what it gathers and keeps, and whom it refuses."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from vllm_efa_ep.bootstrap import coordinator as coordinator_module
from vllm_efa_ep.bootstrap.coordinator import Coordinator, Ticket, digest_of
from vllm_efa_ep.bootstrap.ray import check_same
from vllm_efa_ep.bootstrap.run import Run, new_token
from vllm_efa_ep.errors import ConfigurationError, MembershipError, RankLostError, RankTimeoutError

_RUN = Run.new()
_SOON_S = 0.1
_LONG_S = 60.0


class _Ended:
    """Whether the coordinator has ended itself."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.event.set()


def _coordinator(
    size: int, host_timeout_s: float = _LONG_S, end: Callable[[], None] = lambda: None
) -> Coordinator:
    """Return a coordinator to which all members are connected."""
    coordinator = Coordinator(_RUN.name, size, digest_of(_RUN.token), end, host_timeout_s)
    for rank in range(size):
        coordinator.arrived(f"member {rank}")
    return coordinator


def _ticket(rank: int, token: bytes = _RUN.token, member: str = "") -> Ticket:
    return Ticket(token, rank, member or f"member {rank}", f"process {rank}")


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        await asyncio.wait_for(test(), _LONG_S)

    asyncio.run(within_a_minute())


def test_everybody_gets_everything_in_rank_order() -> None:
    """Whoever comes first; and gatherings do not mix, even if a fast rank is one ahead."""

    async def rank(coordinator: Coordinator, number: int) -> list[list[bytes]]:
        return [
            await coordinator.gather(_ticket(number), step, bytes([step, number]), _LONG_S)
            for step in range(3)
        ]

    async def test() -> None:
        coordinator = _coordinator(4)
        gathered = await asyncio.gather(*(rank(coordinator, number) for number in (2, 0, 3, 1)))
        assert gathered == [[[bytes([step, number]) for number in range(4)] for step in range(3)]] * 4

    _run(test)


def test_keys() -> None:
    """Published values replace each other; of those published once the first one stays."""

    async def test() -> None:
        coordinator = _coordinator(2)
        assert await coordinator.lookup(_ticket(0), "key") is None
        await coordinator.publish(_ticket(0), "key", "old")
        await coordinator.publish(_ticket(1), "key", "new")
        assert await coordinator.lookup(_ticket(0), "key") == "new"
        assert await coordinator.publish_once(_ticket(0), "winner", "first") == "first"
        assert await coordinator.publish_once(_ticket(1), "winner", "second") == "first"
        assert await coordinator.lookup(_ticket(1), "winner") == "first"

    _run(test)


def test_strangers_are_refused_by_name_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """At every door, with a wrong token, half of the right one, and none."""

    async def test() -> None:
        coordinator = _coordinator(1)
        await coordinator.publish(_ticket(0), "key", "right")
        for token in (new_token(), _RUN.token[:16], b""):
            stranger = Ticket(token, 0, "member 0", "a stranger")
            for attempt in (
                coordinator.gather(stranger, 0, b"", _LONG_S),
                coordinator.publish(stranger, "key", "wrong"),
                coordinator.publish_once(stranger, "other", "wrong"),
                coordinator.lookup(stranger, "key"),
                coordinator.join(stranger),
                coordinator.leave(stranger),
            ):
                with pytest.raises(MembershipError, match=f"a stranger is not a member of run {_RUN.name}"):
                    await attempt
        assert await coordinator.lookup(_ticket(0), "key") == "right"
        assert await coordinator.lookup(_ticket(0), "other") is None
        assert await coordinator.gather(_ticket(0), 0, b"mine", _LONG_S) == [b"mine"]

    _run(test)
    assert len(caplog.records) == 18
    assert all("refused a stranger" in record.message for record in caplog.records)


def test_the_token_is_never_shown() -> None:
    """Neither a ticket nor a run prints it."""
    for each in (_RUN, _ticket(0)):
        assert _RUN.token.hex() not in repr(each)
        assert repr(_RUN.token) not in repr(each)


def test_ranks_that_do_not_come_are_named_in_time() -> None:
    """And a rank that does not exist is refused."""

    async def test() -> None:
        coordinator = _coordinator(4)
        early = asyncio.ensure_future(coordinator.gather(_ticket(2), 0, b"", _LONG_S))
        with pytest.raises(RankTimeoutError, match=r"waited 0.1 s .* for ranks \[1, 3\]") as caught:
            await coordinator.gather(_ticket(0), 0, b"", 0.1)
        assert caught.value.missing == (1, 3)
        early.cancel()
        with pytest.raises(ConfigurationError, match=r"claims rank 4 .*; ranks are 0 to 3"):
            await coordinator.lookup(_ticket(4), "key")

    _run(test)


def test_whoever_looks_at_the_log_sees_for_whom_ranks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, until it comes."""
    monkeypatch.setattr(coordinator_module, "_REMIND_S", 0.001)

    async def test() -> None:
        said: asyncio.Queue[str] = asyncio.Queue()
        monkeypatch.setattr(
            coordinator_module.logger, "warning", lambda text, *values: said.put_nowait(text % values)
        )
        coordinator = _coordinator(2)
        waiting = asyncio.ensure_future(coordinator.gather(_ticket(0), 0, b"", _LONG_S))
        for _ in range(3):
            assert await said.get() == f"EFA EP: run {_RUN.name} waits for ranks [1]"
        assert await coordinator.gather(_ticket(1), 0, b"", _LONG_S) == await waiting

    _run(test)


def test_a_rank_that_leaves_or_is_gone_ends_the_wait_for_it() -> None:
    """Long before the deadline."""

    async def test() -> None:
        coordinator = _coordinator(2)
        waiting = asyncio.ensure_future(coordinator.gather(_ticket(0), 0, b"", _LONG_S))
        await coordinator.leave(_ticket(1))
        with pytest.raises(RankLostError, match=r"rank 1 \(process 1\) has left") as caught:
            await waiting
        assert caught.value.rank == 1
        coordinator = _coordinator(2)
        await coordinator.join(_ticket(1))
        waiting = asyncio.ensure_future(coordinator.gather(_ticket(0), 0, b"", _LONG_S))
        await asyncio.sleep(0)
        coordinator.departed("member 1")
        with pytest.raises(RankLostError, match=r"rank 1 \(process 1\) is gone"):
            await waiting

    _run(test)


def test_two_processes_that_claim_one_rank() -> None:
    """While both live it is a mistake; the second takes the place of one that is gone, as soon as it is."""

    async def test() -> None:
        coordinator = _coordinator(1, host_timeout_s=_SOON_S)
        await coordinator.join(_ticket(0))
        coordinator.arrived("second")
        with pytest.raises(ConfigurationError, match="process 0 and process 0 both claim rank 0"):
            await coordinator.join(_ticket(0, member="second"))
        coordinator = _coordinator(1)
        await coordinator.join(_ticket(0))
        coordinator.arrived("third")
        waiting = asyncio.ensure_future(coordinator.gather(_ticket(0, member="third"), 0, b"mine", _LONG_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        coordinator.departed("member 0")
        assert await waiting == [b"mine"]

    _run(test)


def test_a_member_that_connects_again_is_as_before() -> None:
    """Without a connection its requests are refused; a second one that came in time stands for the first."""

    async def test() -> None:
        coordinator = _coordinator(1)
        await coordinator.join(_ticket(0))
        coordinator.departed("member 0")
        with pytest.raises(RankLostError, match="process 0 has lost its connection"):
            await coordinator.lookup(_ticket(0), "key")
        coordinator.arrived("member 0")
        assert await coordinator.lookup(_ticket(0), "key") is None
        coordinator.arrived("member 0")
        coordinator.departed("member 0")
        assert await coordinator.lookup(_ticket(0), "key") is None

    _run(test)


def test_it_ends_when_nobody_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is not enough, and neither is a moment without anybody."""
    monkeypatch.setattr(coordinator_module, "_PATIENCE_S", 0.0)

    async def test() -> None:
        ended = _Ended()
        coordinator = _coordinator(2, end=ended)
        coordinator.departed("member 0")
        coordinator.departed("member 1")
        coordinator.arrived("member 1")
        looked = asyncio.Event()
        asyncio.get_running_loop().call_later(_SOON_S, looked.set)
        await looked.wait()  # after the looks that the ends have scheduled
        assert not ended.event.is_set()
        coordinator.departed("member 1")
        await ended.event.wait()

    _run(test)


def test_it_ends_when_nobody_comes() -> None:
    """The process that created it may die before it connects; a member that has come in time keeps it."""

    async def test() -> None:
        ended = _Ended()
        _coordinator(0, end=ended).end_unless_reached(0.0)
        await ended.event.wait()
        reached = _Ended()
        _coordinator(1, end=reached).end_unless_reached(0.0)
        looked = asyncio.Event()
        asyncio.get_running_loop().call_later(_SOON_S, looked.set)
        await looked.wait()
        assert not reached.event.is_set()

    _run(test)


def test_hosts_that_differ_are_named() -> None:
    """With both values, for versions and settings alike."""
    check_same(["a", "b"], [{"torch": "2.13", "EFA_EP_CHUNK_BYTES": 1}] * 2)
    with pytest.raises(ConfigurationError, match=r"torch: rank 0 on a has '2.13', rank 1 on b has '2.12'"):
        check_same(["a", "b"], [{"torch": "2.13"}, {"torch": "2.12"}])
    with pytest.raises(ConfigurationError, match=r"vllm: rank 0 on a has None, rank 2 on c has '0.33'"):
        check_same(["a", "b", "c"], [{}, {}, {"vllm": "0.33"}])
