"""Where the examples are, and the type of what runs a tool on them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

RunTool = Callable[..., "subprocess.CompletedProcess[str]"]
