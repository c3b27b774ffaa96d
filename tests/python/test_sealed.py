"""What ranks keep in a store that anybody may reach: strangers neither read nor write it."""

import threading
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.sealed import SealedKeys
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import MembershipError

_RUN = Run.new()


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
    keys.publish("a", "a token of the watch")
    keys.publish("b", "a token of the watch")
    assert b"watch" not in stranger.get("a")
    assert stranger.get("a") != stranger.get("b")


@pytest.mark.parametrize(
    "forged", ["plain", "AA==", "bm90IGxvbmc=", "another run's", "another key's", "one bit"]
)
def test_what_a_stranger_writes_is_an_error(store: TCPStore, stranger: PrefixStore, forged: str) -> None:
    """That names the key: text, too little, a value of another run or of another key, or one bit changed."""
    keys = SealedKeys(store, _RUN)
    keys.publish("mask/1", "ranks 0 and 1")
    keys.publish("mask/2", "rank 0")
    if forged == "another run's":
        SealedKeys(store, Run(_RUN.name, bytes(32))).publish("mask/1", "rank 7")
    elif forged == "another key's":
        stranger.set("mask/1", stranger.get("mask/2"))
    elif forged == "one bit":
        sealed = bytearray(stranger.get("mask/1"))
        sealed[20] = ord("A") if sealed[20] != ord("A") else ord("B")
        stranger.set("mask/1", sealed.decode())
    else:
        stranger.set("mask/1", forged)
    for attempt in (lambda: keys.lookup("mask/1"), lambda: keys.publish_once("mask/1", "rank 1")):
        with pytest.raises(MembershipError, match=f"mask/1 .* not a member of run {_RUN.name}"):
            attempt()
    assert keys.lookup("mask/2") == "rank 0"


def test_a_stranger_does_not_get_into_a_gathering(store: TCPStore, stranger: PrefixStore) -> None:
    """In the place of a rank that has not come yet: rank 0 says so, and does not take what it brings."""
    stranger.set("gathering/1/1", "c3RyYW5nZXI=")
    rank_0 = StoreBootstrap(store, _RUN, 0, 2, gather_timeout_s=30.0)
    with pytest.raises(MembershipError, match="gathering/1/1"):
        rank_0.all_gather(b"mine")
    members = [StoreBootstrap(store, run, rank, 2, 30.0) for run in [Run.new()] for rank in range(2)]
    gathered: list[list[bytes]] = []
    other = threading.Thread(target=lambda: gathered.append(members[1].all_gather(b"b")))
    other.start()
    assert members[0].all_gather(b"a") == [b"a", b"b"]
    other.join()
    assert gathered == [[b"a", b"b"]]
