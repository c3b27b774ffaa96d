"""The plugin's CUDA path in the newest supported vLLM, as far as it goes without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_sources import unpacked_sources

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("CPP_BUILD_ROOT", ROOT / "build"))


def test_cuda_path(tmp_path: Path) -> None:
    """Run the scenarios of ``cuda_path_scenarios.py`` on four ranks, and compare with a reference MoE."""
    build = BUILD / "cpp-plain"
    if not list(build.glob("_core*.so")) or not (build / "efaemu").exists():
        pytest.skip("`make test` builds the kernels for fibers, and efaemu")
    paths = [unpacked_sources(tmp_path), ROOT, ROOT / "tests/python", Path(__file__).parent]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("check_cuda_path.py")), str(build)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **inherited,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "VLLM_PLUGINS": "",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-8000:]}"
    print(result.stdout)
