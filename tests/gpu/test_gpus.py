"""What one machine with GPUs can show: several ranks on one GPU, and one rank on each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(GPUS == 0, reason="torch.cuda is not available")
DEADLINE_S = 600


def run(program: str, ranks: int, visible_gpus: int, **environment: str) -> None:
    """Run a program of this directory under torchrun, on the first GPUs."""
    import os

    gpus = ",".join(map(str, range(visible_gpus)))
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            str(Path(__file__).parent / program),
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus, **environment},
        check=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("program", ["rounds.py", "graph.py"])
def test_ranks_share_one_gpu(program: str, ranks: int) -> None:
    """One node; kernels of all ranks run side by side, so each takes few SMs."""
    run(program, ranks, 1, EFA_EP_NUM_SMS="8")


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
@pytest.mark.parametrize("program", ["rounds.py", "graph.py"])
def test_one_rank_per_gpu(program: str) -> None:
    """One node over NVLink."""
    run(program, GPUS, GPUS)


@pytest.mark.skipif(GPUS < 2 or not list(Path("/sys/class/infiniband").glob("rdmap*")), reason="no EFA")
@pytest.mark.parametrize("program", ["rounds.py", "graph.py"])
def test_every_gpu_its_own_node(program: str) -> None:
    """All traffic over EFA, on one machine."""
    run(program, GPUS, GPUS, EFA_EP_RANKS_PER_NODE="1", EFA_EP_PROVIDER="efa-direct")
