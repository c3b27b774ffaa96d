"""Programs for a script's PATH that tell what they were asked, and do nothing."""

import json
import os
import subprocess
from pathlib import Path

from example_files import EXAMPLES

_TELL = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["ASKED"], "a") as asked:
    asked.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if os.path.exists(os.environ.get("EFA_EP_TOKEN_FILE", "")):  # the pods' is not on this machine
    with open(os.environ["EFA_EP_TOKEN_FILE"]) as secret, open(os.environ["ASKED"] + ".secrets", "a") as seen:
        seen.write(os.path.basename(sys.argv[0]) + " " + secret.read())
"""
_RAY = 'if sys.argv[1] == "list":\n    print(json.dumps([{"node_id": "a"}, {"node_id": "b"}], indent=2))\n'


class FakePrograms:
    """Where ``vllm``, ``vllm-efa-ep``, ``ray`` and ``srun`` only tell; ``serve-moe`` is the real serve.sh."""

    def __init__(self, directory: Path) -> None:
        """Write them into an empty directory."""
        self._directory = directory
        self._asked = directory / "asked"
        for name in ("vllm", "vllm-efa-ep", "ray", "srun"):
            program = directory / name
            program.write_text(_TELL + (_RAY if name == "ray" else ""))
            program.chmod(0o755)
        (directory / "serve-moe").symlink_to(EXAMPLES / "serve.sh")

    def run(self, words: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a command with these programs in front of all others."""
        inherited = {"PATH": f"{self._directory}:{os.environ['PATH']}", "ASKED": str(self._asked)}
        return subprocess.run(
            words, env={**inherited, **environment}, capture_output=True, text=True, timeout=300
        )

    def asked(self) -> list[list[str]]:
        """Return what was asked since the last time, program first."""
        if not self._asked.exists():
            return []
        lines = self._asked.read_text().splitlines()
        self._asked.unlink()
        return [json.loads(line) for line in lines]

    def secrets(self) -> dict[str, str]:
        """Return the run's secret as the programs that were told its file have read it."""
        lines = Path(f"{self._asked}.secrets").read_text().splitlines()
        return dict(line.split() for line in lines)
