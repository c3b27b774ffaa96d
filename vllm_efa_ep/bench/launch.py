"""Starts the ranks of a run on this machine, and passes on what rank 0 reports."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bench.plan import Plan
from vllm_efa_ep.bench.results import CellResult
from vllm_efa_ep.errors import ConfigurationError, EfaEpError

_HOST = "127.0.0.1"
_END_SECONDS = 60.0


class RanksFailedError(EfaEpError):
    """A rank of the run ended with an error, which it printed."""


def run_local(plan: Plan, world: int) -> Iterator[CellResult]:
    """Run the plan on ``world`` processes of this machine; yield each cell's result as it comes.

    Raises:
        ConfigurationError: MPI is to be measured, but there is no mpirun.
        RanksFailedError: A rank ended with an error.

    """
    # As under torchrun: the launcher hosts the store, so no port must be guessed.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
    }
    with ExitStack() as cleanup:
        if not environment.get("EFA_EP_TOKEN_FILE"):
            # Only the user can read it, so only processes of the same user can join.
            secret = cleanup.enter_context(tempfile.NamedTemporaryFile("w", prefix="efa_ep_secret_"))
            secret.write(secrets.token_hex(32))
            secret.flush()
            environment["EFA_EP_TOKEN_FILE"] = secret.name
        if plan.needs_mpi:
            ranks = [_start(mpirun(plan, world) + _member(plan, ["-m", "mpi4py"]), environment, True)]
        else:
            ranks = [
                _start(_member(plan), environment | {"RANK": str(rank)}, reports=rank == 0)
                for rank in range(world)
            ]
        for rank in ranks:
            cleanup.callback(_end, rank)
        for line in ranks[0].stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
        _expect_success(ranks)


def mpirun(plan: Plan, world: int) -> list[str]:
    """Return the words that start ``world`` ranks under Open MPI.

    One job uses one transport between two processes, the one that matches what is measured: TCP if every
    rank is a node of its own, shared memory otherwise.
    """
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        raise ConfigurationError("--against mpi needs mpirun; pip install 'vllm-efa-ep[bench]'")
    own_node = ["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"]
    transport = own_node if plan.ranks_per_node == 1 else ["--mca", "btl", "self,sm"]
    return [
        *(program, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(world)),
        *("--mca", "mpi_yield_when_idle", "1", "--mca", "pml", "ob1", *transport),
    ]


def _member(plan: Plan, runner: list[str] | None = None) -> list[str]:
    # mpi4py as the main module aborts all ranks when one of them raises.
    return [sys.executable, *(runner or []), "-m", "vllm_efa_ep.bench.member", plan.to_json()]


def _start(command: list[str], environment: dict[str, str], reports: bool) -> "subprocess.Popen[str]":
    output = subprocess.PIPE if reports else subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=output, text=True)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _expect_success(ranks: "list[subprocess.Popen[str]]") -> None:
    failed = {}
    for number, rank in enumerate(ranks):
        try:
            status = rank.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            failed[number] = f"did not end within {_END_SECONDS:g} s"
            continue
        if status != 0:
            failed[number] = f"ended with status {status}"
    if failed:
        reasons = ", ".join(f"process {number} {reason}" for number, reason in failed.items())
        raise RanksFailedError(f"the run is incomplete: {reasons}; their messages are above")
