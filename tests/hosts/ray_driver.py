"""Drivers of ranks on Ray for the tests: ``ray_driver.py WHAT RUN TOKEN SIZE``. Prints JSON lines."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from bodies import rounds

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.coordinator import Ticket
from vllm_efa_ep.bootstrap.presence import MEMBER_BYTES, Presence
from vllm_efa_ep.bootstrap.ray import RayBootstrap, namespace
from vllm_efa_ep.bootstrap.ray_hosts import RayRanks, inventories, run_on_ray
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.errors import EfaEpError, MembershipError

_SECONDS = 250.0


def play(_: Run, size: int) -> None:
    """Rounds on every host, and what a rank that dies at the start looks like."""
    say("hosts", {address: asdict(each) for address, each in inventories().items()})
    say("result", run_on_ray(size, rounds, start_timeout_s=_SECONDS, timeout_s=_SECONDS))
    try:
        run_on_ray(2, die, start_timeout_s=_SECONDS, timeout_s=_SECONDS)
    except EfaEpError as error:
        say("error", str(error))


def die(bootstrap: Bootstrap) -> None:
    """End rank 1, for which rank 0 then waits."""
    if bootstrap.rank == 1:
        os._exit(3)
    bootstrap.all_gather(b"")


def start(run: Run, size: int) -> None:
    """Start ranks and never look at them again."""
    RayRanks.start(run, size, rounds_and_keys, (_go(run),), start_timeout_s=_SECONDS)
    say("started", True)
    time.sleep(_SECONDS)


def _go(run: Run) -> str:
    """Name the file, in the directory that the hosts share, at whose appearance the ranks go on."""
    return str(Path(os.environ["SHARED_DIRECTORY"], run.name))


def rounds_and_keys(bootstrap: Bootstrap, go: str) -> Any:
    """Rounds, and what the ranks tell each other through the coordinator, which a stranger tries to forge."""
    bootstrap.publish(f"key {bootstrap.rank}", str(bootstrap.rank))
    winner = bootstrap.publish_once("winner", str(bootstrap.rank))
    result = rounds(bootstrap)
    deadline = time.monotonic() + _SECONDS
    while not Path(go).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    bootstrap.all_gather(b"the keys are there")
    keys = [bootstrap.lookup(f"key {rank}") for rank in range(bootstrap.world_size)]
    return result | {"keys": keys, "winner": winner}


def join(run: Run, rank: int) -> None:
    """Be a rank until the test ends this process; no host counts as gone before the test gives up."""
    bootstrap = RayBootstrap(run, rank, 2, host_timeout_s=int(10 * _SECONDS))
    say("joined", bootstrap.rank)
    time.sleep(_SECONDS)


def restart(run: Run, size: int) -> None:
    """Take up what ``start`` began; before, knock at the coordinator and at a rank without the token."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            coordinator: Any = ray.get_actor("coordinator", namespace(run))
            break
        except ValueError:
            assert time.monotonic() < deadline, "no coordinator"
            time.sleep(0.05)
    ticket = Ticket(bytes(32), 0, "stranger", "a stranger")
    attempts = {
        "gather": coordinator.gather.remote(ticket, 0, b"forged", 1.0),
        "publish": coordinator.publish.remote(ticket, "key 0", "forged"),
        "publish_once": coordinator.publish_once.remote(ticket, "winner", "forged"),
        "lookup": coordinator.lookup.remote(ticket, "key 0"),
        "join": coordinator.join.remote(ticket),
        "leave": coordinator.leave.remote(ticket),
        "result": ray.get_actor("rank 0", namespace(run)).result.remote(bytes(32)),
    }
    refused = {}
    for door, answer in attempts.items():
        try:
            ray.get(answer, timeout=_SECONDS)
        except MembershipError as error:
            refused[door] = str(error)
    try:
        Presence(*ray.get(coordinator.door.remote()), ticket.token, "00" * MEMBER_BYTES, _SECONDS)
    except MembershipError as error:
        refused["connection"] = str(error)
    say("refused", refused)
    Path(_go(run)).touch()
    ranks = RayRanks.attach(run, size)
    say("result", ranks.results(_SECONDS))
    ranks.end()


def wait_for_nodes(_: Run, size: int) -> None:
    """Wait until the cluster has exactly ``size`` nodes, each at an address of its own."""
    deadline = time.monotonic() + _SECONDS
    while True:
        addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        if len(addresses) == len(set(addresses)) == size:
            break
        assert time.monotonic() < deadline, addresses
        time.sleep(0.1)
    say("nodes", addresses)


def say(name: str, value: Any) -> None:
    """Let the test know."""
    print(json.dumps({name: value}), flush=True)


def main() -> None:
    """Connect to the cluster and do what the command line says."""
    what, name, token, size = sys.argv[1:]
    ray.init(log_to_driver=False)
    what_to_do = {each.__name__: each for each in (play, start, join, restart, wait_for_nodes)}[what]
    what_to_do(Run(name, bytes.fromhex(token)), int(size))


if __name__ == "__main__":
    main()
