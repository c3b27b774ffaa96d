"""Programs on hosts: started, listened to, and ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from network import Host

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 300.0
_POLL_SECONDS = 0.02


def environment_on(host: Host, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a program on a host: this one's, without its settings of ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EFA_EP_")}
    path = os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests" / "python", ROOT / "tests" / "serving")))
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    paths = {"PYTHONPATH": path, "PATH": binaries}
    return inherited | paths | {"OMP_NUM_THREADS": "1"} | host.environment() | dict(settings or {})


class Program:
    """A running program whose lines on standard output are JSON."""

    def __init__(
        self, host: Host, command: Sequence[str], log: Path, settings: Mapping[str, str] | None = None
    ) -> None:
        """Start it; what it writes goes to ``log``."""
        self._log = log
        self._read = 0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                host.command(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_on(host, settings),
                start_new_session=True,
            )

    def hear(self, name: str, deadline_s: float = DEADLINE_S, of: "Program | None" = None) -> Any:
        """Wait for the line ``{name: value}`` and return the value; in vain if the program ``of`` ends."""
        deadline = time.monotonic() + deadline_s
        while True:
            ended = self.process.poll() is not None
            for line in self._new_lines():
                with contextlib.suppress(json.JSONDecodeError):
                    said = json.loads(line)
                    if isinstance(said, dict) and name in said:
                        return said[name]
            if of is not None and of.process.poll() is not None:
                raise AssertionError(f"waited for {name!r}, but the server ended\n{of.log_tail()}")
            if ended or time.monotonic() > deadline:
                why = (
                    f"ended with {self.process.returncode}" if ended else f"said nothing for {deadline_s:g} s"
                )
                raise AssertionError(f"waited for {name!r}, but the program {why}\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def log_tail(self) -> str:
        """Return the end of what it wrote."""
        return self._log.read_text(errors="replace")[-6000:]

    def _new_lines(self) -> Iterator[str]:
        with self._log.open(errors="replace") as log:
            log.seek(self._read)
            while (line := log.readline()).endswith("\n"):
                self._read = log.tell()
                yield line

    def __enter__(self) -> "Program":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it, and the processes that it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, and so have they
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
