"""vLLM's MoE kernels on our backends for CUDA, without a GPU: a program, run by test_cuda_path.py.

Four ranks on two nodes, each a process. vLLM's sources are as released: configuration, groups, communicator,
selection, ``FusedMoEKernel``, micro-batches. Below the plugin everything is the product's down to the kernels
on CPU fibers. fake_gpu.py and tests/python/cuda_on_fibers.py have what stands in for the GPU.

    PYTHONPATH=<vLLM's sources>:tests/python python check_cuda_path.py DIRECTORY

DIRECTORY has a ``_core`` with the kernels for fibers, and the provider efaemu.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

_PR_SET_PDEATHSIG = 1
RANKS, RANKS_PER_NODE = 4, 2
SETTINGS = {
    "EFA_EP_PROVIDER": "efaemu",
    "EFA_EP_RANKS_PER_NODE": str(RANKS_PER_NODE),
    "EFA_EP_GPU_SIGNALS": "pinned",
    "EFA_EP_NUM_SMS": "2",
    "EFA_EP_CHUNK_BYTES": "2048",
    "EFA_EP_TIMEOUT_S": "30",
}


def prepare(build: Path) -> None:
    """Import everything once, with what stands in for a GPU; the ranks are forked from here."""
    import fake_gpu
    import torch
    from cuda_on_fibers import fake_cuda, load_core
    from test_cuda_rounds import newest_libfabric

    torch.set_num_threads(1)
    os.environ.update(SETTINGS, EFA_EP_LIBFABRIC=newest_libfabric(), FI_PROVIDER_PATH=str(build / "efaemu"))
    library = load_core(build)
    fake_gpu.fake_torch_cuda(library)
    from vllm_efa_ep.cuda.streams import current_stream

    fake_cuda(library, "pinned", current_stream)
    fake_gpu.import_vllm_for_cuda()

    from vllm_efa_ep.vllm_plugin import register

    register()
    import cuda_path_scenarios  # noqa: F401


def run_rank(rank: int, store_port: int) -> int:
    """Play all scenarios as one rank; return the process's exit status."""
    import cuda_path_scenarios
    from vllm_on_ranks import VllmRank

    try:
        with VllmRank(rank, RANKS, store_port) as vllm_rank:
            for scenario in cuda_path_scenarios.SCENARIOS:
                start = time.monotonic()
                scenario(vllm_rank)
                if rank == 0:
                    print(f"{scenario.__name__}: as expected ({time.monotonic() - start:.1f} s)", flush=True)
    except BaseException:
        print(f"--- rank {rank}", file=sys.stderr)
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    """Play, and remove the counters that the ranks wrote: as forked children they leave that to others."""
    with tempfile.TemporaryDirectory(prefix="efa_ep_stats_") as directory:
        os.environ["EFA_EP_STATS_DIR"] = directory
        prepare(Path(sys.argv[1]))
        return play()


def play() -> int:
    """Fork the ranks and return how many failed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os._exit(run_rank(rank, store.port))
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
