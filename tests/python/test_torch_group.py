"""A torch process group takes whoever comes; who comes without the run's secret stays outside of the run."""

import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_world import ProcessWorld, Rank, run_processes

from vllm_efa_ep.bootstrap.choice import choose_bootstrap
from vllm_efa_ep.bootstrap.run import read_secret
from vllm_efa_ep.bootstrap.torch import TorchBootstrap, _warn_of_no_secret
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError

_SIZE = 3
_STRANGER = 2


@pytest.fixture
def secrets(tmp_path: Path) -> list[str]:
    """Files of each rank: the members' are on hosts of their own, the stranger has guessed."""
    paths = [tmp_path / f"secret{rank}" for rank in range(_SIZE)]
    for path in paths[:_STRANGER]:
        path.write_text("a secret that is long enough to be one\n")
    paths[_STRANGER].write_text("another secret that is long enough")
    return [str(path) for path in paths]


def _join(secret: str) -> TorchBootstrap:
    return TorchBootstrap(dist.group.WORLD, settings=Settings(token_file=secret))


def _meet_twice(_: Rank, secret: str) -> Any:
    """Two runs with one secret; what they are named, their tokens, and what is gathered and published."""
    runs = [_join(secret) for _ in range(2)]
    told = []
    for each in runs:
        each.publish(f"key/{each.rank}", str(each.rank))
        told.append([text.decode() for text in each.all_gather(str(each.rank).encode())])
        told.append([str(each.lookup(f"key/{other}")) for other in range(_SIZE)])
    chosen = choose_bootstrap(dist.group.WORLD, Settings(token_file=secret))
    assert isinstance(chosen, TorchBootstrap)
    return [each.run.name for each in runs], [each.run.token for each in [*runs, chosen]], told


def test_members_with_one_secret_meet(secrets: list[str]) -> None:
    """Every run has a token of its own, which follows from the secret and which nobody says."""
    first, *others = run_processes(_SIZE, _meet_twice, secrets[0])
    names, tokens, told = first
    assert others == [first] * 2
    assert told == [["0", "1", "2"]] * 4
    assert len(set(names)) == 2
    assert len(set(tokens)) == 3


def _join_twice_and_listen(_: Rank, secret: str) -> list[str]:
    """What this process logs meanwhile, as if it had joined nothing before."""
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    _warn_of_no_secret.cache_clear()
    logging.getLogger("vllm_efa_ep.bootstrap").addHandler(Listener())
    for _ in range(2):
        _join(secret)
    return logged


def test_a_run_without_a_secret_says_so_once(secrets: list[str]) -> None:
    """One rank, one time, however many instances it builds: the log of a cluster shall say who may join."""
    (line,), *others = run_processes(_SIZE, _join_twice_and_listen, "")
    assert "whoever gets into torch's process group is a member" in line
    assert others == [[], []]
    assert run_processes(_SIZE, _join_twice_and_listen, secrets[0]) == [[], [], []]


def _say(said: bytes) -> list[bytes]:
    """Take part in a gathering of the group as bare torch, as a stranger does."""
    group = TorchBootstrap.__new__(TorchBootstrap)
    group._group = dist.group.WORLD
    return group._gather_in_group(said, _SIZE)


def _guess(secrets: list[str]) -> None:
    _join(secrets[_STRANGER])


def _do_without(_: list[str]) -> None:
    _join("")


@dataclass
class _Code:
    """Runs when it is unpickled."""

    file: str

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.file,)


def _send_code(secrets: list[str]) -> None:
    _say(pickle.dumps(_Code(secrets[_STRANGER] + ".ran")))


def _announce_too_much(_: list[str]) -> None:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_SIZE)]
    dist.all_gather(sizes, torch.tensor([1 << 40]))


def _put_back(secrets: list[str]) -> None:
    """Say again what a member said in an earlier run, from its greeting on."""
    said: list[bytes] = []

    class Overheard(TorchBootstrap):
        def _gather_in_group(self, payload: bytes, world_size: int) -> list[bytes]:
            said.append(payload)
            return super()._gather_in_group(payload, world_size)

    Overheard(dist.group.WORLD, settings=Settings(token_file=secrets[0]))
    for each in said:
        _say(each)


def _meet_a_stranger(rank: Rank, stranger: Callable[[list[str]], None], secrets: list[str]) -> None:
    """Members join once, and, where the stranger was a member before, twice."""
    if rank.bootstrap.rank == _STRANGER:
        stranger(secrets)
        return
    if stranger is _put_back:
        _join(secrets[rank.bootstrap.rank])
    _join(secrets[rank.bootstrap.rank])


_REFUSED = "what rank 2 told in gathering 1 of the process group was written by somebody who is not a member"


@pytest.mark.parametrize(
    ("stranger", "error", "message"),
    [
        (_guess, "MembershipError", _REFUSED),
        (_put_back, "MembershipError", _REFUSED),
        (_do_without, "ConfigurationError", "ranks [2] of the process group have no EFA_EP_TOKEN_FILE"),
        (_send_code, "ConfigurationError", "rank 2 says something that is not understood here"),
        (_announce_too_much, "ConfigurationError", f"{1 << 40}] bytes, of at most"),
    ],
    ids=["guesses", "puts-back", "does-without", "sends-code", "announces-too-much"],
)
def test_a_stranger_in_the_group_is_named_by_every_member(
    stranger: Callable[[list[str]], None], error: str, message: str, secrets: list[str]
) -> None:
    """And none of them tells it anything: their token is not in what it hears, and no code of its runs."""
    with ProcessWorld(_SIZE, _meet_a_stranger, stranger, secrets) as world:
        for rank in range(_STRANGER):
            ended = world.ended(rank)
            assert (ended.error, message in ended.message) == (error, True), ended
    assert not Path(secrets[_STRANGER] + ".ran").exists()


@pytest.mark.parametrize("file", ["/nowhere/secret", os.devnull])
def test_a_secret_that_is_none(file: str) -> None:
    """Missing or too short: with the way to make one."""
    with pytest.raises(ConfigurationError, match=f"EFA_EP_TOKEN_FILE {file}.*openssl rand -hex 32"):
        read_secret(Path(file), "EFA_EP_TOKEN_FILE")
