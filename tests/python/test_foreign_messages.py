"""What other processes say at the start, when it is anything at all: a typed error, or a genuine start.

Messages are genuine ones with parts replaced by any JSON, or any bytes. Nothing here may raise an error that
is not one of this package's, and nothing may be taken over unchecked.
"""

import json
import os
import socket
import struct
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_efa_ep import diagnosis, watch
from vllm_efa_ep.bootstrap.descriptors import DescriptorExchange
from vllm_efa_ep.bootstrap.key_gather import KeyGather
from vllm_efa_ep.errors import ConfigurationError, EfaEpError, RankExcludedError, RankTimeoutError
from vllm_efa_ep.membership import Agreement, Membership
from vllm_efa_ep.watch import start_watch
from vllm_efa_ep.world import World, join_world

LONG = os.environ.get("LONG_TESTS") == "1"
_EXAMPLES = settings(max_examples=5000 if LONG else 300)


def _open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["127.0.0.1", "10.0.0.1", "00" * 16])
)
_ANYTHING = st.recursive(
    _LEAVES,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=4), part, max_size=4),
    max_leaves=6,
)


def _said(genuine: st.SearchStrategy[object]) -> st.SearchStrategy[bytes]:
    """Draw messages: nearly genuine JSON, any JSON, deeply nested JSON, any bytes."""
    return st.one_of(
        genuine.map(lambda said: json.dumps(said).encode()),
        _ANYTHING.map(lambda said: json.dumps(said).encode()),
        st.just(b"[" * 100_000),
        st.binary(max_size=60),
    )


class _Conversation:
    """A bootstrap of two ranks, of which the test plays rank 1."""

    rank = 0
    world_size = 2
    address = "127.0.0.1"

    def __init__(self, *answers: bytes, reports: dict[str, str] | None = None) -> None:
        self._answers = list(answers)
        self._reports = reports or {}

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Answer with what comes next."""
        return [payload, self._answers.pop(0) if self._answers else b"+"]

    def publish(self, key: str, value: str) -> None:
        """Keep nothing."""

    def publish_once(self, key: str, value: str) -> str:
        """Let what rank 1 has said stand."""
        return self._reports.setdefault(key, value)

    def lookup(self, key: str) -> str | None:
        """Return what rank 1 reports."""
        return self._reports.get(key)


_CLAIMS = st.fixed_dictionaries(
    {
        "rank": st.just(1) | _ANYTHING,
        "host": st.just("there") | _ANYTHING,
        "settings": st.just({"hidden": 16}) | _ANYTHING,
    }
)


@_EXAMPLES
@given(sign=st.sampled_from([b"+", b"-", b""]), said=_said(_CLAIMS), more=st.binary(max_size=2))
def test_joining(sign: bytes, said: bytes, more: bytes) -> None:
    """Whoever joins is rank 1 with the same settings, or all are told why not."""
    try:
        world = join_world(_Conversation(sign + said + more), {"hidden": 16}, 0)
    except ConfigurationError:
        return
    claim = json.loads(said + more)
    assert (claim["rank"], claim["settings"]) == (1, {"hidden": 16})
    assert (world.rank, world.size, len(world.host_of)) == (0, 2, 2)


_LISTENERS = st.tuples(
    st.just("127.0.0.1") | _ANYTHING, st.integers(0, 70_000) | _ANYTHING, st.just("00" * 32) | _ANYTHING
)


@_EXAMPLES
@given(said=_said(_LISTENERS), own_host=st.booleans())
def test_listening(said: bytes, own_host: bool) -> None:
    """No watch starts with rank 1: its address is no address, it cannot be called, or it does not call."""

    def refuse(*_: object) -> socket.socket:
        raise ConnectionRefusedError("connection refused")

    world = World(0, 2, 1, (0, 0) if own_host else (0, 1), (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", refuse)
        with pytest.raises(ConfigurationError):
            start_watch(world, _Conversation(b"+" + said), 0.0)


@_EXAMPLES
@given(hellos=st.lists(st.binary(max_size=40), max_size=3))
def test_hellos(hellos: list[bytes]) -> None:
    """Only the one with the token is a child, whatever came before it."""
    with watch._listen_at("127.0.0.1") as server:
        address = server.getsockname()
        listener = watch._Listener(address[0], address[1], "5a" * 32)
        genuine = watch._HELLO.pack(bytes.fromhex(listener.token), 1)
        for hello in (*hellos, genuine):
            with socket.create_connection(address) as caller:
                caller.sendall(hello)
        accepted = watch._answer(server, listener, {1}, 180.0)
        assert list(accepted) == [1]
        accepted[1].close()


@_EXAMPLES
@given(said=_said(st.tuples(st.just("dispatch_recv of round 1") | _ANYTHING, st.lists(st.integers(-1, 3)))))
def test_reports(said: bytes) -> None:
    """A timeout keeps its error; an unreadable report adds that it is one."""
    error = RankTimeoutError("waited", "dispatch_recv", 1, (1,))
    bootstrap = _Conversation(reports={"report/1": said.decode(errors="replace")})
    reason = diagnosis.explain(bootstrap, error, 0.0, lambda: "")
    assert "rank" in reason


def _text(said: bytes) -> str:
    return said.decode(errors="replace")


_PAYLOADS = st.lists(st.sampled_from(["", "AA==", "AAA=", "A"]) | _ANYTHING, min_size=1, max_size=3)


@_EXAMPLES
@given(said=_said(_PAYLOADS), rank=st.integers(0, 1))
def test_gatherings(said: bytes, rank: int) -> None:
    """A gathering over keys is one payload of every rank, whoever wrote it: one rank's, or all of them."""
    keys = _Conversation(
        reports={"gathering/1/all" if rank else f"gathering/1/{n}": _text(said) for n in (0, 1)}
    )
    try:
        gathered = KeyGather(rank, 2, 1000.0).all_gather(keys, b"own")
    except ConfigurationError:
        return
    assert len(gathered) == 2
    assert all(type(payload) is bytes for payload in gathered)


_MASKS = st.fixed_dictionaries(
    {
        "generation": st.just(1) | _ANYTHING,
        "ranks_per_node": st.integers(0, 3) | _ANYTHING,
        "members": st.lists(st.integers(-1, 2), max_size=3) | _ANYTHING,
        "incarnations": st.lists(st.integers(-1, 2**31), min_size=1, max_size=3)
        | st.just([0, 0])
        | _ANYTHING,
    }
)


@_EXAMPLES
@given(said=_said(_MASKS))
def test_masks(said: bytes) -> None:
    """What stands as the next generation is one of this world and has this rank, or does not hold here."""
    agreement = Agreement(_Conversation(reports={"mask/1": _text(said)}), 0.0)
    try:
        agreed = agreement.next(Membership.first(2, 1), frozenset, {})
    except (ConfigurationError, RankExcludedError):
        return
    assert agreed.members in ((0,), (0, 1))
    assert (agreed.generation, agreed.incarnations[0], len(agreed.incarnations)) == (1, 0, 2)
    assert agreed.ranks_per_node in (1, 2)


_INCARNATIONS = st.integers(-1, 2) | st.just(2**31) | _ANYTHING


@_EXAMPLES
@given(said=_said(_INCARNATIONS))
def test_who_is_here(said: bytes) -> None:
    """A rank is in the next generation in the incarnation it says, which is a number, or nobody agrees."""
    reports = {"here/1/0": "0", "here/1/1": _text(said)}
    try:
        agreed = Agreement(_Conversation(reports=reports), 0.0).next(Membership.first(2, 1), frozenset, {})
    except ConfigurationError:
        return
    assert agreed.incarnations == (0, json.loads(said))
    assert agreed.members == (0, 1)


_WAITING = st.lists(st.tuples(st.integers(-1, 2) | _ANYTHING, _INCARNATIONS), max_size=2)


@_EXAMPLES
@given(returned=st.none() | _said(_INCARNATIONS), found=st.none() | _said(_WAITING))
def test_who_waits(returned: bytes | None, found: bytes | None) -> None:
    """Who is let in is a rank of this world in an incarnation, from its own words or another member's."""
    said = {"returned/1": returned, "waiting/0/7": found}
    reports = {key: _text(words) for key, words in said.items() if words is not None}
    try:
        waiting = Agreement(_Conversation(reports=reports), 0.0).waiting(Membership(0, 1, (0,), (0, 0)), 7)
    except ConfigurationError:
        return
    for rank, incarnation in waiting.items():
        assert rank in (0, 1)
        assert type(incarnation) is int
        assert 0 <= incarnation < 2**31


@_EXAMPLES
@given(message=st.binary(max_size=40), index=st.none() | st.integers(0, 5), count=st.integers(0, 2))
def test_descriptors(message: bytes, index: int | None, count: int) -> None:
    """What is received is the peer's one descriptor, or nothing stays open. An index comes with the token."""
    with closing(DescriptorExchange(0, 2)) as exchange, closing(DescriptorExchange(1, 2)) as peer:
        read, write = os.pipe()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                name, token = exchange.invitation.split()
                if index is not None:
                    message = bytes.fromhex(token) + struct.pack("=I", index)
                stranger.connect(f"\0{name}")
                socket.send_fds(stranger, [message or b"\0"], [read] * count)
            before = _open_descriptors()
            try:
                received = exchange.exchange(write, [exchange.invitation, peer.invitation], 0.05)
            except ConfigurationError:
                received = {}
            for descriptor in received.values():
                os.close(descriptor)
            assert list(received) in ([], [1])
            assert _open_descriptors() == before
        finally:
            os.close(read)
            os.close(write)


class _EndedWatch(watch.Watch):
    """Knows when a connection has ended."""

    def __init__(self, neighbours: dict[int, socket.socket]) -> None:
        self.ended = threading.Event()
        super().__init__(0, 3, neighbours)

    def _hear(self, neighbour: int) -> bool:
        more = super()._hear(neighbour)
        if not more:
            self.ended.set()
        return more


@_EXAMPLES
@given(
    news=st.binary(max_size=12)
    | st.lists(st.integers(0, 4) | st.sampled_from([2**32 - 1]), max_size=3).map(
        lambda ranks: struct.pack(f"!{len(ranks)}I", *ranks)
    )
)
def test_news(news: bytes) -> None:
    """Whatever a neighbour says before its connection ends, its end is noticed, and somebody is named."""
    near, far = socket.socketpair()
    watched = _EndedWatch({1: near})
    far.sendall(news)
    far.close()
    assert watched.ended.wait(180.0)
    assert watched.gone <= {0, 1, 2}
    if struct.pack("!I", 1) not in [news[at : at + 4] for at in range(0, len(news), 4)]:
        with pytest.raises(EfaEpError):
            watched.check("dispatch_recv", 1, "waited")
    watched.close()
