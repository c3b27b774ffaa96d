"""Ranks on hosts of their own, joined by torch.distributed: rounds, and a host that vanishes."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Host, hosts
from programs import HERE, Program

_PORT = 29_500
_TIMEOUT_S = 60
_HOST_TIMEOUT_S = 4


@contextlib.contextmanager
def _world(body: str, machines: list[Host], logs: Path, **settings: str) -> Iterator[list[Program]]:
    """One rank per host that runs ``body``."""
    with contextlib.ExitStack() as running:
        yield [
            running.enter_context(
                Program(
                    host,
                    [
                        *(sys.executable, str(HERE / "torch_rank.py"), body, str(host.index)),
                        *(str(len(machines)), machines[0].address, str(_PORT)),
                    ],
                    logs / f"rank{host.index}.log",
                    {"EFA_EP_PROVIDER": "tcp", **settings},
                )
            )
            for host in machines
        ]


def test_rounds_between_four_hosts(tmp_path: Path) -> None:
    """Each host is a node of its own, whatever the machine's name, and all rows are right."""
    with hosts(4) as machines, _world("rounds", machines, tmp_path) as ranks:
        results = [rank.hear("result") for rank in ranks]
    assert [each["rank"] for each in results] == [0, 1, 2, 3]
    assert len({each["namespace"] for each in results}) == 4
    for each in results:
        assert each["nodes"] == 4
        assert each["provider"] in ("tcp", "net")
        assert each["network_rows"] > 0


@pytest.mark.parametrize("lost", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_host_that_vanishes_is_noticed_though_nobody_speaks(lost: int, tmp_path: Path) -> None:
    """No packet says that it is gone; TCP's keep-alive does. Rank 0 is the one that all hosts connect to."""
    settings = {"EFA_EP_HOST_TIMEOUT_S": str(_HOST_TIMEOUT_S)}
    with hosts(3) as machines, _world("idle_until_a_host_is_lost", machines, tmp_path, **settings) as ranks:
        for rank in ranks:
            assert rank.hear("event") == "idle"
        machines[lost].cut()
        for rank in (rank for number, rank in enumerate(ranks) if number != lost):
            assert rank.hear("result")["lost"] == lost


def test_a_host_that_vanishes_in_a_round_is_named_in_time(tmp_path: Path) -> None:
    """By every other rank, within the deadline of the halves, although its process never ends."""
    settings = {"EFA_EP_TIMEOUT_S": str(_TIMEOUT_S), "EFA_EP_HOST_TIMEOUT_S": str(_HOST_TIMEOUT_S)}
    body = "rounds_until_a_host_is_lost"
    with hosts(3) as machines, _world(body, machines, tmp_path, **settings) as ranks:
        for rank in ranks:
            assert rank.hear("event") == "playing"
        machines[2].cut()
        for rank in ranks[:2]:
            result = rank.hear("result")
            assert "rank 2" in result["message"], result
            assert result["error"] == "RankLostError", result
