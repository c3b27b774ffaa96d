"""Which backend vLLM uses, and who hears about what is wrong."""

import os
import subprocess
import sys
from pathlib import Path


def test_selection() -> None:
    """Run the scenarios of ``check_selection.py``; patches stay, so they need processes of their own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("check_selection.py"))],
        capture_output=True,
        text=True,
        env={**inherited, "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-6000:]}"
    assert result.stdout.count("as expected") > 1
