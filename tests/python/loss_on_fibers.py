"""Ranks that wait on their GPU when another is lost: a program, run by test_cuda_rounds.py.

cuda_on_fibers.py says how. Here no half waits for its kernels: a rank launches them and then waits for its
GPU, asking nobody, as ``torch.cuda.synchronize()`` does. No deadline is near, so a wait that nobody ends does
not end, and the engine says so.

    python loss_on_fibers.py DIRECTORY_OF_CORE LIBFABRIC per_expert|per_token none|fp8
"""

import sys
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cuda_on_fibers import fake_cuda, load_core

if TYPE_CHECKING:
    from vllm_efa_ep import Dispatched, Handle

_SIZE, _RANKS_PER_NODE = 4, 2
_TOKENS, _HIDDEN = 5, 128
_FIRST_VICTIM, _SECOND_VICTIM = 3, 1


def main() -> None:
    """Lose a rank, then one while another has a stand-in, then let a rank call the last other one off."""
    directory, libfabric, layout, quantisation = sys.argv[1:]
    library = load_core(Path(directory))
    fake_cuda(library, "pinned", eager=False)
    quantisations = record_quantisations()

    from thread_world import DEADLINE_S, ThreadBootstrap, run_ranks, settings_of

    from vllm_efa_ep import AllToAll, AllToAllConfig
    from vllm_efa_ep.all_to_all_config import QUANTISATIONS
    from vllm_efa_ep.errors import RankLostError, TransportError

    # Every token goes to the one expert of every rank, and comes back as often as ranks are alive.
    config = AllToAllConfig(
        *(_HIDDEN, _SIZE, _SIZE, _TOKENS),
        torch.float32 if quantisation == "none" else torch.float8_e4m3fn,
        torch.float32,
        quantisation=quantisation,
        layout=layout,
        device="cuda",
    )
    settings = settings_of(
        _RANKS_PER_NODE,
        provider="efaemu",
        libfabric=libfabric,
        num_sms=2,
        timeout_s=100 * DEADLINE_S,
        mask_window_s=100 * DEADLINE_S,
    )
    x = torch.ones(_TOKENS, _HIDDEN, dtype=config.input_dtype)
    ids = torch.arange(_SIZE, dtype=torch.int32).repeat(_TOKENS, 1)
    weights = torch.ones(_TOKENS, _SIZE)
    # All that are alive, before the next one goes: what it sent has arrived.
    together = {live: Barrier(live, timeout=DEADLINE_S) for live in (4, 3, 2)}

    def finish(all_to_all: AllToAll, dispatched: "Dispatched", handle: "Handle") -> None:
        # Codes are scaled: those of a row of equal numbers are all the largest.
        rows = dispatched.x if quantisation == "none" else (dispatched.x.float() == 448).float()
        out = all_to_all.combine(rows, handle)
        library.simt_synchronize()
        all_to_all.raise_fault()
        torch.testing.assert_close(out, x.float() * len(all_to_all.active_ranks()), rtol=0, atol=0)

    def play(all_to_all: AllToAll) -> None:
        finish(all_to_all, *all_to_all.dispatch(x, ids, weights))

    def expect_loss(error: BaseException, victim: int, half: str) -> None:
        assert f"rank {victim} is gone" in str(error), error
        if isinstance(error, RankLostError):
            assert (error.rank, error.half) == (victim, half)

    def body(bootstrap: ThreadBootstrap) -> None:
        all_to_all = AllToAll(config, bootstrap, settings)
        rank = all_to_all.rank
        # The network fails as well for the rail peer of who is lost, or its stand-in, and that is never 0.
        lost = RankLostError if rank == 0 else (RankLostError, TransportError)
        play(all_to_all)

        dispatched, handle = all_to_all.dispatch(x, ids, weights)
        library.simt_synchronize()
        together[4].wait()
        if rank == _FIRST_VICTIM:
            all_to_all.__exit__(RuntimeError, RuntimeError("lost"), None)
            return
        with pytest.raises(lost) as first:
            finish(all_to_all, dispatched, handle)
        expect_loss(first.value, _FIRST_VICTIM, "combine_recv")
        all_to_all.mask()
        play(all_to_all)

        together[3].wait()
        if rank == _SECOND_VICTIM:
            all_to_all.__exit__(RuntimeError, RuntimeError("lost"), None)
            return
        with pytest.raises(lost) as second:
            play(all_to_all)
        expect_loss(second.value, _SECOND_VICTIM, "dispatch_recv")
        all_to_all.mask()
        play(all_to_all)

        together[2].wait()
        if rank != 0:
            with pytest.raises(RankLostError, match=r"another rank has given up and called mask\(\)"):
                play(all_to_all)
        all_to_all.mask()
        assert all_to_all.active_ranks() == (0, 2)
        play(all_to_all)
        all_to_all.close()
        print(f"rank {rank}: {first.value}; {second.value}", flush=True)

    run_ranks(_SIZE, body)
    # A stand-in launches what its server has launched: a kernel that is new to the GPU may have to wait until
    # all that run are over.
    assert set(quantisations) == {QUANTISATIONS[quantisation]}


def record_quantisations() -> list[object]:
    """Return a list that gets the quantisation of every device that is made."""
    from vllm_efa_ep import _core

    quantisations: list[object] = []
    device = _core.CudaDevice

    def make(**arguments: Any) -> object:
        quantisations.append(arguments["quantisation"])
        return device(**arguments)

    _core.CudaDevice = make  # type: ignore[assignment, misc]
    return quantisations


if __name__ == "__main__":
    main()
