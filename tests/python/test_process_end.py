"""A process ends as it should: no thread of torch comes back into an interpreter that is no more.

Such a thread ends the process with ``std::terminate``. Each process here makes its interpreter's end long, so
that what would come back does.
"""

import json
import subprocess
import sys

from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bench.measure import Effort
from vllm_efa_ep.bench.plan import Plan

_PLAN = Plan((256,), ("bf16",), (1,), 16, 4, ("gloo-agrs",), Effort(1, 2, 2, 0.0), 1, 1)

_LATE_ANSWER = """
import atexit, sys, time
from torch._C._distributed_c10d import TCPStore
from vllm_efa_ep.bootstrap import store
from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.errors import EfaEpError

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(2.0)

sys.modules["late"] = Late()  # goes when the interpreter does
shared = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False)
bootstrap = store.StoreBootstrap(shared, Run("test", bytes(32)), 0, 2)
answer_seconds, store._ANSWER_SECONDS = store._ANSWER_SECONDS, 0.1
try:
    bootstrap._keys.lookup = lambda key: shared.get(key)
    bootstrap.lookup("later")
except EfaEpError as error:
    print(error, flush=True)
store._ANSWER_SECONDS = answer_seconds
atexit.register(print, "ending", flush=True)
"""

_BENCH_RANK = """
import gc, json, sys
from pathlib import Path
from vllm_efa_ep.bench.member import measure_with_torch
from vllm_efa_ep.bench.plan import Plan

found = []
gc.collect()
gc.disable()  # a process group in a cycle would live until the interpreter's end
measure_with_torch(Plan.from_json(sys.argv[1]), found.append)
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print(json.dumps([len(found), threads]))
"""


def test_an_answer_that_comes_at_the_end() -> None:
    """The store was silent for longer than a request waits, and answers when the process ends."""
    shared = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-c", _LATE_ANSWER, str(shared.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "does not answer" in process.stdout.readline()
        assert process.stdout.readline() == "ending\n"
        shared.set("later", "at last")
        _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_a_rank_of_a_benchmark_leaves_no_thread_of_gloo() -> None:
    """Its process group goes with the last reference to it, not when the interpreter does."""
    shared = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(shared.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "1",
        "RANK": "0",
    }
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c"]
    ended = subprocess.run([*command, _BENCH_RANK, _PLAN.to_json()], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    cells, threads = json.loads(ended.stdout.splitlines()[-1])
    assert cells == 1
    assert [name for name in threads if "gloo" in name] == []
