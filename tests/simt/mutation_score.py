"""Plants the bugs of mutations.txt in the CUDA kernels, one at a time, and counts those that the tests find.

Only kernels that contain the changed file are compiled again, with their commands of the given CMake trees,
and linked before the right ones. A bug counts as found when a test fails, a kernel does
not end, the engine objects, or ThreadSanitizer reports a race: as the tests run in `make test-cpp`, on random
schedules, or under ThreadSanitizer as in `make test-simt`, which goes first where only it can find the bug.

Exit status 1: fewer than 95 % are found, or one that survives is not explained in the list.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass

from tests.simt.mutations import ROOT, Mutation, read_mutations

REQUIRED = 0.95
WALL_SECONDS = 600  # for a program that waits without taking processor time
# Limits are of processor time, which other load on the machine does not stretch.
SLACK = 4  # times that a program may take what it takes without a bug, and ten seconds more


@dataclass(frozen=True)
class Run:
    """One program of a stage: its name, the tests to run, and how to preempt: SIMT_CHAOS and SIMT_SEED."""

    program: str
    tests: str
    chaos: int = 0
    seed: int = 0


def worlds(*numbers: int) -> str:
    """The rounds of the worlds with these numbers in halves_test.cpp."""
    return ":".join(f"Nodes/Worlds.RunTheirRounds/{number}" for number in numbers)


STAGES: dict[str, list[Run]] = {
    "tests": [
        Run("simt_faults_test", "*"),
        Run("simt_quantisation_test", "*"),
        Run("simt_bytes_test", "*"),
        Run("simt_rank_loss_test", "*"),
        Run("simt_times_test", "*"),
        Run("simt_halves_test", "Nodes/Worlds.RunTheirRounds/*:Releases.*:Sets.*"),
    ],
    # Worlds of up to four ranks
    "schedules": [
        Run("simt_halves_test", worlds(1, 2, 3, 4), chaos=chaos, seed=chaos) for chaos in (1, 2, 3, 6)
    ],
    "threads": [Run("simt_halves_test", f"{worlds(1, 3, 4)}:Releases.*:Sets.*", chaos=6)],
}
# What goes wrong by chance only, on a CPU
ORDERING = {"order", "barrier"}


class Tree:
    """A CMake tree with EFA_EP_SIMT=ON whose tests are built."""

    def __init__(self, build: pathlib.Path) -> None:
        """`build` is the tree's directory."""
        self._build = build
        commands = json.loads((build / "compile_commands.json").read_text())
        self._compile = {
            pathlib.Path(entry["file"]): shlex.split(entry["command"])
            for entry in commands
            if "simt_kernels.dir" in entry["command"] and entry["file"].endswith(".cu")
        }
        self._includes = {source: self._headers(command) for source, command in self._compile.items()}
        self._link = {
            run.program: self._link_command(run.program) for runs in STAGES.values() for run in runs
        }

    def _ninja(self, *arguments: str) -> str:
        command = ["ninja", "-C", str(self._build), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _headers(self, command: list[str]) -> set[pathlib.Path]:
        listing = self._ninja("-t", "deps", command[command.index("-o") + 1])
        return {pathlib.Path(line.strip()) for line in listing.splitlines() if line.startswith(" ")}

    def _link_command(self, program: str) -> list[str]:
        line = self._ninja("-t", "commands", "-s", f"simt/{program}").strip().splitlines()[-1]
        return shlex.split(line.removeprefix(": && ").removesuffix(" && :"))

    def compile(self, mutation: Mutation, work: pathlib.Path) -> list[str]:
        """Compiles every kernel that contains the bug, in an empty directory. Returns the object files."""
        # Found before the right file by #include "cuda/...".
        changed = work / mutation.file.relative_to(ROOT / "csrc")
        changed.parent.mkdir()
        changed.write_text(mutation.mutant())
        objects = []
        for source, command in self._compile.items():
            if source != mutation.file and mutation.file not in self._includes[source]:
                continue
            target = str(work / f"{source.stem}.o")
            arguments = [*command[1:-1], str(changed if source == mutation.file else source)]
            arguments[arguments.index("-o") + 1] = target
            # The tests are short: what -O3 saves them is less than what it costs.
            subprocess.run([command[0], "-w", f"-I{work}", *arguments, "-O1"], check=True, cwd=self._build)
            objects.append(target)
        return objects

    def link(self, program: str, objects: list[str], work: pathlib.Path) -> pathlib.Path:
        """Links a test program with these objects instead of the library's."""
        target = work / program
        words = self._link[program].copy()
        words[words.index("-o") + 1] = str(target)
        # First of all: a test that includes a header of the kernels has its functions; the first ones count.
        tests = next(at for at, word in enumerate(words) if word.endswith(".o"))
        subprocess.run([*words[:tests], *objects, *words[tests:]], check=True, cwd=self._build)
        return target


def verdict(program: pathlib.Path, run: Run, seconds: int) -> str:
    """Runs a program for at most `seconds` of processor time. Returns what it found, or nothing."""
    environment = os.environ | {"SIMT_CHAOS": str(run.chaos), "SIMT_SEED": str(run.seed)}
    environment |= {"TSAN_OPTIONS": "halt_on_error=1 symbolize=0", "GTEST_FAIL_FAST": "1", "SIMT_HANG": "10"}
    command = ["prlimit", f"--cpu={seconds}", str(program), f"--gtest_filter={run.tests}"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no end in {WALL_SECONDS} s"
    if done.returncode == 0:
        return ""
    if done.returncode == -signal.SIGKILL or done.returncode == -signal.SIGXCPU:
        return f"no end in {seconds} s of processor time"
    output = done.stdout + done.stderr
    for pattern in (
        r"ThreadSanitizer: (data race)",
        r"simt: dev \d+ (kernel .*)",
        r"simt: (?!workers)(.*)",
        r"\[  FAILED  \] ([\w/.]+)",
    ):
        if found := re.search(pattern, output):
            return re.sub(r" (block|thread) \d+( \(.*?\))?", "", found.group(1))[:80]
    return f"exit status {done.returncode}"


def processor_seconds() -> float:
    """What all processes that have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def time_limits(trees: dict[str, Tree], work: pathlib.Path) -> dict[Run, int]:
    """Runs everything without a bug. Raises RuntimeError if that fails."""
    limits = {}
    for stage, runs in STAGES.items():
        for run in runs:
            program = trees[stage].link(run.program, [], work)
            start = processor_seconds()
            if found := verdict(program, run, WALL_SECONDS):
                raise RuntimeError(f"{run} fails without a bug: {found}")
            limits[run] = 10 + round(SLACK * (processor_seconds() - start))
    return limits


def find(mutation: Mutation, trees: dict[str, Tree], limits: dict[Run, int]) -> tuple[str, str]:
    """The stage that finds a bug, and what it says; two empty strings if all tests pass."""
    compiled: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for stage in sorted(STAGES, key=lambda stage: (stage == "threads") != (mutation.kind in ORDERING)):
            tree = trees[stage]
            work = pathlib.Path(directory, str(id(tree)))
            if id(tree) not in compiled:
                work.mkdir()
                compiled[id(tree)] = tree.compile(mutation, work)
            for run in STAGES[stage]:
                if found := verdict(tree.link(run.program, compiled[id(tree)], work), run, limits[run]):
                    return stage, found
    return "", ""


def report(results: list[tuple[Mutation, str]]) -> int:
    """Prints the survivors and the score. Returns the exit status."""
    survivors = [mutation for mutation, stage in results if not stage]
    for mutation in survivors:
        print(f"\nsurvives: {mutation.file.name}: {mutation.name}\n  {mutation.survives or 'NOT EXPLAINED'}")
    stages = Counter(stage for _, stage in results if stage)
    found = len(results) - len(survivors)
    print(f"\n{found} of {len(results)} mutants found ({found / len(results):.1%}): ", end="")
    print(", ".join(f"{stages[stage]} by {stage}" for stage in STAGES))
    good = found >= REQUIRED * len(results) and all(mutation.survives for mutation in survivors)
    return 0 if good else 1


def main() -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plain", type=pathlib.Path, help="CMake tree of the tests")
    parser.add_argument("thread", type=pathlib.Path, help="the same with EFA_EP_SANITIZE=thread")
    parser.add_argument("--only", default="", help="a regular expression: mutants with such a 'file: name'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    arguments = parser.parse_args()
    mutations = [m for m in read_mutations() if re.search(arguments.only, f"{m.file.name}: {m.name}")]
    if not mutations:
        parser.error(f"no mutation has a name like {arguments.only!r}")
    trees = {"tests": Tree(arguments.plain.resolve()), "threads": Tree(arguments.thread.resolve())}
    trees["schedules"] = trees["tests"]
    with tempfile.TemporaryDirectory() as work:
        limits = time_limits(trees, pathlib.Path(work))
    results = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        verdicts = pool.map(lambda mutation: find(mutation, trees, limits), mutations)
        for mutation, (stage, found) in zip(mutations, verdicts, strict=True):
            name = f"{mutation.file.name}: {mutation.name}"
            print(f"{mutation.kind:8}{name:64}{stage or 'SURVIVES':10}{found}".rstrip(), flush=True)
            results.append((mutation, stage))
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
