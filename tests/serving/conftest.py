"""Models and references of the serving tests, made once per session."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_server import FAMILIES, ROOT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory of the small model of each family."""
    directory = tmp_path_factory.mktemp("models")
    writer = [sys.executable, str(ROOT / "examples/local/write_model.py"), "--out", str(directory)]
    subprocess.run([*writer, *FAMILIES], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {family: directory / family for family in FAMILIES}


@pytest.fixture(scope="session")
def references(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]]]:
    """Tokens of every prompt for each family, from vLLM in one process without the plugin."""
    out = tmp_path_factory.mktemp("reference") / "tokens.json"
    log = out.with_suffix(".log")
    command = [sys.executable, str(Path(__file__).with_name("reference_run.py")), str(out)]
    with log.open("wb") as output:
        status = subprocess.run(
            [*command, *map(str, models.values())], stdout=output, stderr=output
        ).returncode
    assert status == 0, f"the reference run failed with {status}\n{log.read_text(errors='replace')[-4000:]}"
    tokens: dict[str, Any] = json.loads(out.read_text())
    return tokens
