"""``make bench``: one dispatch + combine round against its peers and the floors.

``docs/performance.md`` says what is measured. Writes ``round_trip.json`` and ``round_trip.png``.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.goals import GOALS, CellResult
from vllm_efa_ep.bench.barrier import SharedBarrier
from vllm_efa_ep.bench.environment import cpu_model

DTYPES = ["bf16", "fp32"]
REPOSITORY = Path(__file__).resolve().parent.parent
# One job uses one MPI transport, because Open MPI picks shared memory wherever it may.
MPI_TRANSPORTS = {
    "same_node": ["--mca", "btl", "self,sm"],
    "own_node": ["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"],
}


def main() -> int:
    """Run the command; the exit status says whether every launch ended well."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = machine_line(max(options.ranks))
    print(machine)
    print(report.header(), flush=True)
    results: list[CellResult] = []
    started = time.monotonic()
    failed = False
    for scene in options.scenes:
        for world in options.ranks:
            launch = Launch(scene, world, options)
            for result in launch.results():
                results.append(result)
                print(report.line(result), flush=True)
            if launch.status != 0:
                failed = True
                print(f"{scene}, {world} ranks: mpirun ended with status {launch.status}", flush=True)
    write_results(results, machine, options)
    print(f"\n{len(results)} cells in {time.monotonic() - started:.0f} s")
    for text in (*report.alone_lines(results), *(goal.judge(results) for goal in GOALS)):
        print(text)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Return the options; ``--quick`` changes the defaults of the grid."""
    quick = "--quick" in sys.argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller grid, about two minutes")
    parser.add_argument("--scenes", nargs="+", choices=MPI_TRANSPORTS, default=list(MPI_TRANSPORTS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168] if quick else [2048, 7168])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"] if quick else DTYPES)
    tokens = [1, 16, 128, 1024] if quick else [1, 16, 128, 1024, 4096]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--seconds-per-cell", type=float, default=3.0, help="time for a cell's iterations")
    parser.add_argument("--alone", action="store_true", help="time each contestant alone, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "bench")
    parser.add_argument(
        "--bare-writes-library",
        type=Path,
        default=REPOSITORY / "build" / "cpp-plain" / "benchmarks" / "libbare_writes.so",
        help="the built bare_writes.cpp",
    )
    options = parser.parse_args()
    if not options.bare_writes_library.exists():
        parser.error(f"{options.bare_writes_library} does not exist; `make bench` builds it")
    return options


def machine_line(ranks: int) -> str:
    """Say what the numbers depend on."""
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    text = (
        f"{cpu_model()}, {cores} cores, torch {torch.__version__}, Python {platform.python_version()}, "
        f"top-8 of 256, {datetime.now(timezone.utc):%Y-%m-%d}"
    )
    if ranks > cores:
        text += (
            f"\n{ranks} ranks on {cores} cores take turns: their times include waiting for a core "
            "(all contestants yield or sleep while they wait)"
        )
    if load > 0.5:
        text += f"\nload average {load:.1f} at the start: other work on this machine spoils the numbers"
    return text


class Launch:
    """One mpirun: all cells of a scene and world size, in one set of processes."""

    def __init__(self, scene: str, world: int, options: argparse.Namespace) -> None:
        """Take the grid from ``options``."""
        self._scene = scene
        self._world = world
        self._options = options
        self.status: int | None = None

    def results(self) -> Iterator[CellResult]:
        """Run it and yield each cell's result as it comes; sets ``status`` at the end."""
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="efa_ep_bench_") as directory:
            shared = Path(directory) / "barrier"
            shared.write_bytes(bytes(SharedBarrier.file_bytes(self._world)))
            process = subprocess.Popen(
                self._command(shared),
                cwd=REPOSITORY,
                env=self._environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                for text in process.stdout or ():
                    if text.startswith("{"):
                        yield json.loads(text)
                    else:
                        print(text, end="", file=sys.stderr)
            finally:
                if process.poll() is None:
                    process.terminate()
                self.status = process.wait()

    def _command(self, shared: Path) -> list[str]:
        options = self._options
        mpirun = Path(sys.executable).parent / "mpirun"
        program = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
        if program is None:
            raise SystemExit("mpirun not found; pip install 'vllm-efa-ep[bench]'")
        grid = [
            (hidden, dtype, tokens)
            for hidden in options.hidden
            for dtype in options.dtypes
            for tokens in options.tokens
        ]
        return [
            *(program, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(self._world)),
            *("--mca", "mpi_yield_when_idle", "1", "--mca", "pml", "ob1", *MPI_TRANSPORTS[self._scene]),
            # mpi4py as the main module aborts all ranks when one of them raises.
            *(sys.executable, "-m", "mpi4py", "-m", "benchmarks.rank"),
            *("--scene", self._scene, "--shared", str(shared), "--cells", json.dumps(grid)),
            *("--seconds-per-cell", str(options.seconds_per_cell), "--seed", str(options.seed)),
            *("--bare-writes-library", str(options.bare_writes_library.resolve())),
            *(["--alone"] if options.alone else []),
        ]

    @staticmethod
    def _environment() -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def write_results(results: list[CellResult], machine: str, options: argparse.Namespace) -> None:
    """Write the JSON file and the plot."""
    document = {
        "machine": machine,
        "command": sys.argv,
        "seed": options.seed,
        "results": results,
    }
    (options.out / "round_trip.json").write_text(json.dumps(document, indent=1) + "\n")
    if any("contestants" in result for result in results):
        report.plot(results, options.out / "round_trip.png")
    print(f"\nwritten: {options.out}/round_trip.json and .png")


if __name__ == "__main__":
    sys.exit(main())
