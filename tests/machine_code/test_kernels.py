"""The machine code that nvcc makes of csrc/cuda: no spills, few registers, wide accesses, few fences.

Needs nvcc (CUDA 13) and cuobjdump, but no GPU. What a kernel may use is fixed here, so that a change that
costs registers or fences shows in review.
"""

import collections
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
MOST_REGISTERS = 64
# Places in a kernel's code that make the SM wait for the whole system: releases to peers and the proxy,
# acquires after waits, and the error word wherever something can fail. How often they run is tested in
# tests/simt.
MOST_SYSTEM_FENCES = 11
ROW_KERNELS = ("stage_tokens", "pack_rows", "reduce_rows", "sum_rail", "gather_tokens")


def _tool(name: str) -> str:
    directories = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    for directory in directories:
        found = shutil.which(name, path=f"{directory}/bin")
        if found:
            return found
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} not found: set CUDA_HOME, or pip install the test extra")
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """Compiles every source for one architecture. A spill or local memory is an error of ptxas."""
    nvcc = _tool("nvcc")
    directory = tmp_path_factory.mktemp(request.param)
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--expt-relaxed-constexpr", f"-arch={request.param}"]
    gate = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]
    running = {}
    for source in SOURCES:
        cubin = directory / f"{source.stem}.cubin"
        command = [nvcc, *flags, *gate, "-cubin", str(source), "-o", str(cubin)]
        running[cubin] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    logs = {}
    for cubin, process in running.items():
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        log = cubin.with_suffix(".log")
        log.write_text(errors)
        logs[cubin.stem] = log
    return logs


def test_registers_leave_room_for_four_blocks_per_sm(compiled: dict[str, pathlib.Path]) -> None:
    """Blocks of both channels, and of the caller, fit one SM."""
    used = [int(n) for log in compiled.values() for n in re.findall(r"Used (\d+) registers", log.read_text())]
    assert len(used) >= 18
    assert max(used) <= MOST_REGISTERS


def _instructions(cubin: pathlib.Path) -> dict[str, collections.Counter[str]]:
    """How often each instruction, with its modifiers, is in each kernel."""
    listing = subprocess.run(
        [_tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    kernels: dict[str, collections.Counter[str]] = {}
    counter: collections.Counter[str] = collections.Counter()
    for line in listing.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            counter = kernels.setdefault(name.group(1), collections.Counter())
        elif code := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line):
            counter[code.group(1)] += 1
    return kernels


def _count(counter: collections.Counter[str], pattern: str) -> int:
    return sum(count for name, count in counter.items() if re.fullmatch(pattern, name))


def test_rows_move_sixteen_bytes_at_a_time(compiled: dict[str, pathlib.Path]) -> None:
    """Rows are read and written 16 bytes at a time, nothing is in local memory, and fences stay few."""
    seen = set()
    for log in compiled.values():
        for kernel, instructions in _instructions(log.with_suffix(".cubin")).items():
            assert _count(instructions, r"(LDL|STL)(\..*)?") == 0, kernel
            for name in ROW_KERNELS:
                if name not in kernel:
                    continue
                seen.add(name)
                assert _count(instructions, r"LDG\..*\.128(\..*)?") > 0, kernel
                assert _count(instructions, r"STG\..*\.128(\..*)?") > 0, kernel
                assert _count(instructions, r"MEMBAR\..*SYS") <= MOST_SYSTEM_FENCES, kernel
    assert seen == set(ROW_KERNELS)
