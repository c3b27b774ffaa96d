"""Every seam and every patch fits the installed vLLM and the sources of the newest supported one.

Its compiled extension is not needed: the checks run in a process of their own that imports those sources.
"""

import os
import subprocess
import sys
from pathlib import Path

from vllm_sources import VLLM_VERSION, unpacked_sources


def check_seams(python_path: str) -> str:
    """Run ``check_seams.py`` and return what it printed; it says what does not fit."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("check_seams.py"))],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHONPATH": python_path, "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"},
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-4000:]}"
    return result.stdout


def test_installed_vllm() -> None:
    """The vLLM of this environment."""
    assert "all seams fit vLLM" in check_seams("")


def test_newest_vllm(tmp_path: Path) -> None:
    """The sources from the wheel."""
    assert f"all seams fit vLLM {VLLM_VERSION}" in check_seams(str(unpacked_sources(tmp_path)))
