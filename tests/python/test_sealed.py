"""What ranks keep in a store that anybody may reach: strangers neither read nor write it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.sealed import SealedKeys
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import MembershipError, RankTimeoutError

_RUN = Run.new()
_SOON_S = 1.0
_NEVER_S = 60.0  # a deadline for those who must not need one


@pytest.fixture
def store() -> TCPStore:
    """A store of torch.distributed."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def stranger(store: TCPStore) -> PrefixStore:
    """Another process' connection to it, under the name of the run, which is no secret."""
    connection = TCPStore(
        "127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    return PrefixStore(f"vllm_efa_ep/{_RUN.name}", connection)


def _publish(keys: SealedKeys, key: str, value: str) -> None:
    """Set a key as a member, and wait until that is done: connections are served in any order."""
    keys.publish(key, value)
    assert keys.lookup(key) == value


def _overwrite(stranger: PrefixStore, key: str, text: str | bytes) -> None:
    """Set a key as a stranger, and wait until that is done."""
    stranger.set(key, text)
    stranger.get(key)


def test_members_read_what_members_wrote(store: TCPStore) -> None:
    """Replaced values, values that stand, and those that are not there; and runs are apart."""
    one, other = SealedKeys(store, _RUN), SealedKeys(store, _RUN)
    assert one.lookup("key") is None
    one.publish("key", "old")
    one.publish("key", "new \N{SNOWMAN}")
    assert other.lookup("key") == "new \N{SNOWMAN}"
    assert one.publish_once("winner", "first") == "first"
    assert other.publish_once("winner", "second") == "first"
    assert SealedKeys(store, Run.new()).lookup("key") is None


def test_a_stranger_reads_nothing(store: TCPStore, stranger: PrefixStore) -> None:
    """Neither the value, nor whether two are the same."""
    keys = SealedKeys(store, _RUN)
    _publish(keys, "a", "a token of the watch")
    _publish(keys, "b", "a token of the watch")
    assert b"watch" not in stranger.get("a")
    assert stranger.get("a") != stranger.get("b")


@pytest.mark.parametrize(
    "forged", ["plain", "AA==", "bm90IGxvbmc=", "another run's", "another key's", "one bit"]
)
def test_what_a_stranger_writes_is_an_error(store: TCPStore, stranger: PrefixStore, forged: str) -> None:
    """That names the key: text, too little, a value of another run or of another key, or one bit changed."""
    keys = SealedKeys(store, _RUN)
    _publish(keys, "mask/1", "ranks 0 and 1")
    _publish(keys, "mask/2", "rank 0")
    if forged == "another run's":
        _publish(SealedKeys(store, Run(_RUN.name, bytes(32))), "mask/1", "rank 7")
    elif forged == "another key's":
        _overwrite(stranger, "mask/1", stranger.get("mask/2"))
    elif forged == "one bit":
        sealed = bytearray(stranger.get("mask/1"))
        sealed[20] = ord("A") if sealed[20] != ord("A") else ord("B")
        _overwrite(stranger, "mask/1", sealed.decode())
    else:
        _overwrite(stranger, "mask/1", forged)
    for attempt in (lambda: keys.lookup("mask/1"), lambda: keys.publish_once("mask/1", "rank 1")):
        with pytest.raises(MembershipError, match=f"mask/1 .* not a member of run {_RUN.name}"):
            attempt()
    assert keys.lookup("mask/2") == "rank 0"


def test_what_a_stranger_puts_back_a_member_has_said(store: TCPStore, stranger: PrefixStore) -> None:
    """Under this key, in this run: to put it back is to destroy what came after it, and no more."""
    keys = SealedKeys(store, _RUN)
    _publish(keys, "report/1", "old")
    old = stranger.get("report/1")
    _publish(keys, "report/1", "new")
    _overwrite(stranger, "report/1", old)
    assert keys.lookup("report/1") == "old"
    other = SealedKeys(store, Run(_RUN.name, Run.new().token))
    with pytest.raises(MembershipError, match="report/1"):
        other.lookup("report/1")


def _gather(store: TCPStore, run: Run, rank: int, timeout_s: float) -> list[bytes]:
    return StoreBootstrap(store, run, rank, 2, timeout_s).all_gather(b"ab"[rank : rank + 1])


def test_a_stranger_does_not_become_a_rank(store: TCPStore) -> None:
    """In the place of rank 1, which comes later: rank 0 takes nothing from it and lets nobody wait."""
    with ThreadPoolExecutor() as threads:
        stranger = threads.submit(_gather, store, Run(_RUN.name, bytes(32)), 1, _NEVER_S)
        with pytest.raises(MembershipError, match="gathering/1/1"):
            _gather(store, _RUN, 0, _NEVER_S)
        with pytest.raises(MembershipError, match="gathering/ended"):
            stranger.result()
        with pytest.raises(RankTimeoutError, match=r"rank 0: gathering/1/1 .* not a member of run"):
            _gather(store, _RUN, 1, _NEVER_S)


def test_what_a_stranger_destroys_ends_a_wait_at_its_deadline(store: TCPStore, stranger: PrefixStore) -> None:
    """Whose word is missing is named, by the rank that waits and by the one that has said it."""
    with ThreadPoolExecutor() as threads:
        rank_1 = threads.submit(_gather, store, _RUN, 1, _NEVER_S)
        stranger.get("gathering/1/1")  # waits for it
        stranger.delete_key("gathering/1/1")
        with pytest.raises(RankTimeoutError, match="waited for rank 1") as waited:
            _gather(store, _RUN, 0, _SOON_S)
        assert waited.value.missing == (1,)
        with pytest.raises(RankTimeoutError, match=r"given up by rank 0.* waited for rank 1"):
            rank_1.result()
