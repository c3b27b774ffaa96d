"""Runs the CUDA kernels on random schedules: their source and their PTX, plain and under sanitizers.

Every seed makes other worlds (TEST_SEED) and preempts elsewhere (SIMT_SEED, SIMT_CHAOS). A run that fails is
printed with the command that repeats it, and the others go on. A table at the end says what ran.

    python -m tests.simt.schedules plain=build/cpp-plain address=build/cpp-address thread=build/cpp-simt

Exit status 1: something failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

# Programs; PTX has all of them in one.
SOURCE = ("halves", "times", "faults", "quantisation", "bytes", "rank_loss", "emulated")
# Rows of real models, numbers one by one: no matter of schedules. Deadlines of tests are missed when the
# machine is busy with other seeds. What is too much for a sanitizer leaves itself out.
LEFT_OUT = ["Models/*", "Bytes.Of*", "*OfEveryNumber*", "All/FaultOnDevice.*"]
LEFT_OUT_OF = {
    "sm_80": ["Releases.*"],  # there acquire fences are release fences as well
    "address": ["LargeWorld.*"],  # a minute each; smaller worlds have other schedules, too
    "thread": ["LargeWorld.*", "Bytes.*"],  # which count; races are in the rounds of all tests
}
CPU_SECONDS = 1200  # of a program that goes round in circles


@dataclass(frozen=True)
class Target:
    """What is tested: the source, or the PTX of an architecture, in one build."""

    code: str
    build: str
    programs: tuple[pathlib.Path, ...]

    @property
    def tests(self) -> str:
        """GoogleTest's filter."""
        return "-" + ":".join(LEFT_OUT + LEFT_OUT_OF.get(self.code, []) + LEFT_OUT_OF.get(self.build, []))


@dataclass
class Result:
    """What runs came to."""

    passed: int = 0
    failed: int = 0
    cpu_seconds: float = 0.0

    def __iadd__(self, other: Result) -> Result:
        """Adds other runs."""
        self.passed += other.passed
        self.failed += other.failed
        self.cpu_seconds += other.cpu_seconds
        return self


def targets_of(build: str, tree: pathlib.Path) -> list[Target]:
    """What a CMake tree has. Raises FileNotFoundError if it has no tests of the kernels."""
    source = tuple((tree / f"simt/simt_{name}_test").resolve(strict=True) for name in SOURCE)
    programs = (tree / "simt/ptx").glob("simt_ptx_sm_*")
    ptx = {path.name.removeprefix("simt_ptx_"): path.resolve() for path in programs if path.is_file()}
    in_order = sorted(ptx, key=lambda name: int(re.sub(r"\D", "", name)))
    return [Target("source", build, source), *(Target(code, build, (ptx[code],)) for code in in_order)]


def schedule(seed: int) -> dict[str, str]:
    """The environment of a seed."""
    return {
        "TEST_SEED": str(seed),
        "SIMT_SEED": str(seed),
        "SIMT_CHAOS": str(2 + seed % 6),
        "LONG_TESTS": "0",
    }


def run(target: Target, program: pathlib.Path, seed: int) -> Result:
    """Runs a program, and prints what it said if it fails."""
    environment = schedule(seed) | {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [str(program), f"--gtest_filter={target.tests}"]
    process = subprocess.Popen(
        ["prlimit", f"--cpu={CPU_SECONDS}", *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    passed = len(re.findall(r"^\[       OK \] ", output, re.MULTILINE))
    failed = len(re.findall(r"^\[  FAILED  \] .* ms\)$", output, re.MULTILINE))
    if process.returncode != 0:
        failed = max(failed, 1)  # one that ended the program says nothing
        words = [*(f"{name}={value}" for name, value in environment.items()), *command]
        print(f"{output}\nfailed ({process.returncode}): {shlex.join(words)}", flush=True)
    return Result(passed, failed, usage.ru_utime + usage.ru_stime)


def table(results: dict[Target, Result], seeds: int) -> str:
    """One line per target, in Markdown."""
    lines = ["| code | build | seeds | tests | failures | minutes of CPU |", "|---|---|---|---|---|---|"]
    for target, result in results.items():
        tests = result.passed + result.failed
        minutes = f"{result.cpu_seconds / 60:.1f}"
        lines.append(f"| {target.code} | {target.build} | {seeds} | {tests} | {result.failed} | {minutes} |")
    return "\n".join(lines)


def main() -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs="+", metavar="build=tree", help="a name for the table, a CMake tree")
    parser.add_argument("--only", default="", help="a regular expression: of source, sm_80, sm_90a, sm_100a")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="programs at a time")
    arguments = parser.parse_args()
    results: dict[Target, Result] = {}
    for argument in arguments.trees:
        build, _, tree = argument.partition("=")
        for target in targets_of(build, pathlib.Path(tree)):
            if re.search(arguments.only, target.code):
                results[target] = Result()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    runs = [(target, program, seed) for seed in seeds for target in results for program in target.programs]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for (target, program, seed), result in zip(
            runs, pool.map(lambda each: run(*each), runs), strict=True
        ):
            results[target] += result
            words = f"{target.code}, {target.build}: {program.name}: {result.passed} passed"
            print(f"seed {seed} of {seeds.start} to {seeds.stop - 1}: {words}", file=sys.stderr, flush=True)
    print(table(results, arguments.seeds))
    return 1 if any(result.failed for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
