"""Runs the tools that validate the examples."""

import os
import subprocess
from pathlib import Path

import pytest
from example_files import ROOT, RunTool


@pytest.fixture(scope="session")
def run_tool() -> RunTool:
    """Return a function that runs a program of the tools' environment."""
    tools = Path(os.environ.get("EXAMPLE_TOOLS", ROOT / "build" / "example-tools")) / "bin"
    if not tools.exists():
        pytest.fail(f"{tools} does not exist; `make test-examples` sets it up")

    def run(program: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([tools / program, *words], capture_output=True, text=True)

    return run
