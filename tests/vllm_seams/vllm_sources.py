"""The Python sources of the newest supported vLLM, unpacked from its wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

VLLM_VERSION = "0.33.0"


def cache_directory() -> Path:
    """Return where the sources stay between runs: the wheel has several hundred megabytes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-efa-ep" / f"vllm-{VLLM_VERSION}-python"


def unpacked_sources(download: Path) -> Path:
    """Return a directory with the package ``vllm``, without its compiled extensions.

    Args:
        download: Empty directory for the wheel, if it must be downloaded.

    """
    directory = cache_directory()
    if directory.exists():
        return directory
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(download)]
    result = subprocess.run([*command, f"vllm=={VLLM_VERSION}"], capture_output=True, text=True)
    wheels = list(download.glob("vllm-*.whl"))
    if not wheels:
        pytest.skip(
            f"the wheel of vLLM {VLLM_VERSION} cannot be downloaded here; this test runs where pip reaches a "
            f"package index. pip said: {result.stderr.strip()[-400:]}"
        )
    unpacked = directory.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wanted = [name for name in wheel.namelist() if name.endswith(".py") or ".dist-info/" in name]
        wheel.extractall(unpacked, wanted)
    wheels[0].unlink()
    unpacked.rename(directory)
    return directory
