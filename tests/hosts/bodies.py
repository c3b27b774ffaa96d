"""What ranks on several hosts do in the tests, whichever bootstrap they come with."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "python"))

from oracle import Batch, check_combined, check_dispatched, compute_experts

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import EfaEpError, RankLostError, RankTimeoutError

CONFIG = AllToAllConfig(64, 12, 4, 20)
ROUNDS = 4
# No test waits for so long; a rank whose test is gone ends by itself.
_LOST_SECONDS = 300.0

Tell = Callable[[str], None]


def rounds(bootstrap: Bootstrap, _: Tell = print) -> dict[str, Any]:
    """Play rounds against the oracle; return what the fabric turned out to be."""
    torch.set_num_threads(1)
    with AllToAll(CONFIG, bootstrap) as all_to_all:
        for number in range(ROUNDS):
            play_round(all_to_all, number)
        stats = all_to_all.stats()
    return {
        "rank": stats.rank,
        "namespace": os.readlink("/proc/self/ns/net"),  # noqa: PTH115
        "nodes": stats.nodes,
        "provider": stats.provider,
        "network_rows": stats.network_rows,
    }


def play_round(all_to_all: AllToAll, number: int) -> None:
    """One round, the same on all ranks for a number, checked at both ends."""
    random = torch.Generator().manual_seed(number)
    batches = [
        Batch(
            torch.randn(20 - rank, 64, generator=random).bfloat16(),
            torch.randint(-1, 12, (20 - rank, 4), generator=random),
            torch.rand(20 - rank, 4, generator=random),
            None,
        )
        for rank in range(all_to_all.world_size)
    ]
    own = batches[all_to_all.rank]
    got, handle = all_to_all.dispatch(own.x, own.topk_ids, own.topk_weights)
    check_dispatched(CONFIG, batches, all_to_all.local_experts, got)
    output = compute_experts(CONFIG, all_to_all.local_experts, got, per_slot=False, weighted=True)
    check_combined(CONFIG, own, True, False, all_to_all.combine(output, handle))


def rounds_until_a_host_is_lost(bootstrap: Bootstrap, tell: Tell) -> dict[str, Any]:
    """Play rounds without end; return the error that ends them, and after how long a wait it came."""
    torch.set_num_threads(1)
    all_to_all = AllToAll(CONFIG, bootstrap)
    number = 0
    while True:
        begun = time.monotonic()
        try:
            play_round(all_to_all, number)
        except (RankLostError, RankTimeoutError) as error:
            waited = time.monotonic() - begun
            all_to_all.close()
            return {"error": type(error).__name__, "message": str(error), "seconds": waited}
        if number == ROUNDS:
            tell("playing")
        number += 1


def idle_until_a_host_is_lost(bootstrap: Bootstrap, tell: Tell) -> dict[str, Any]:
    """Say nothing to anybody; return what the watch finds out by itself."""
    all_to_all = AllToAll(CONFIG, bootstrap)
    watch = all_to_all._generations.current().connection.watch
    tell("idle")
    deadline = time.monotonic() + _LOST_SECONDS
    while watch.lost is None:
        if time.monotonic() > deadline:
            raise EfaEpError("nobody was lost")
        time.sleep(0.05)
    return {"lost": watch.lost, "verdict": watch.verdict()}


BODIES = {each.__name__: each for each in (rounds, rounds_until_a_host_is_lost, idle_until_a_host_is_lost)}
