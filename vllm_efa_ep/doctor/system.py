"""All that the checks see of a machine: files below a root, programs, and the environment.

A recorded machine is a directory, a table of what programs print, and a table of variables.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_efa_ep.errors import EfaEpError

PROBE = "vllm-efa-ep-probe"
"""First word of the command that runs a module of ``vllm_efa_ep.doctor.probes``."""

_PROGRAM_SECONDS = 30.0
_PROBE_SECONDS = 180.0  # the first import of vLLM on a cold disk


@dataclass(frozen=True)
class Printed:
    """What a program printed (standard output; on failure the error output as well), and its exit status."""

    status: int
    text: str


Run = Callable[[tuple[str, ...]], Printed | None]
"""Runs a command; ``None`` if there is no such program."""


class System:
    """A machine, live or recorded."""

    def __init__(self, root: Path, environment: Mapping[str, str], run: Run) -> None:
        """See the files below ``root``, these variables, and what ``run`` prints."""
        self.root = root
        self.environment = environment
        self._run = run
        self._probes: dict[str, dict[str, Any]] = {}

    def path(self, path: str) -> Path:
        """Return where the absolute ``path`` is."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """Return the text of a file without white space at its ends, or ``None`` if it cannot be read."""
        try:
            return self.path(path).read_text(errors="replace").strip()
        except OSError:
            return None

    def names(self, directory: str) -> list[str]:
        """Return the sorted names in a directory, none if there is no such directory."""
        try:
            return sorted(entry.name for entry in self.path(directory).iterdir())
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return self.path(path).exists()

    def writable(self, path: str) -> bool:
        """Return whether this process may read and write a file."""
        return os.access(self.path(path), os.R_OK | os.W_OK)

    def run(self, *words: str) -> Printed | None:
        """Run a program, or return ``None`` if there is none of that name."""
        return self._run(words)

    def probe(self, name: str) -> dict[str, Any]:
        """Run a probe once and return what it found.

        Raises:
            EfaEpError: It ended without an answer; the message has the end of what it printed.

        """
        if name not in self._probes:
            printed = self._run((PROBE, name))
            lines = printed.text.splitlines() if printed is not None else []
            if printed is None or printed.status != 0 or not lines:
                raise EfaEpError(f"the probe {name} died: {' '.join(lines[-3:]) or 'it printed nothing'}")
            self._probes[name] = json.loads(lines[-1])
        return self._probes[name]


def this_system() -> System:
    """Return the machine that this process runs on."""
    return System(Path("/"), os.environ, run_program)


def run_program(words: tuple[str, ...]) -> Printed | None:
    """Run a program on this machine, within a deadline."""
    probe = words[0] == PROBE
    if probe:
        words = (sys.executable, "-m", f"vllm_efa_ep.doctor.probes.{words[1]}")
    if shutil.which(words[0]) is None:
        return None
    limit = _PROBE_SECONDS if probe else _PROGRAM_SECONDS
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Printed(1, f"{' '.join(words)} did not end within {limit:g} s")
    errors = ended.stderr if ended.returncode != 0 else ""
    return Printed(ended.returncode, ended.stdout + errors)
