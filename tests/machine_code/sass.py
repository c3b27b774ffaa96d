"""What nvcc makes of csrc/cuda: compiles, and lists instructions with the functions that they come from.

Needs nvcc (CUDA 13) and nvdisasm, but no GPU.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))

_DEFINITION = re.compile(r"(?:DP_DEVICE |    (?=\w+\(const DeviceState)).*?(\w+)\(")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
_KERNEL = re.compile(r"\s*\.section\s+\.text\.[^,]*?\d((?:[a-z]+_)+[a-z]+)(?:IL|EPK)\w*,")


@dataclass(frozen=True)
class Place:
    """A line of csrc/cuda, and the function around it, if there is one; empty for other sources."""

    function: str
    text: str


@dataclass(frozen=True)
class Instruction:
    """One instruction with its modifiers, as in LDG.E.128, and where it comes from, inlined into the next."""

    name: str
    places: tuple[Place, ...]

    def is_from(self, function: str) -> bool:
        """Whether it is part of a function, or of what is inlined there."""
        return any(place.function == function for place in self.places)


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit, the machine's or the wheels'. Skips the test without it."""
    wheels = f"{sysconfig.get_path('purelib')}/nvidia/cu13"
    for directory in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", wheels):
        found = shutil.which(name, path=f"{directory}/bin")
        if found:
            return found
    pytest.skip(f"{name} not found: set CUDA_HOME, or pip install the test extra")


def compile_kernels(
    source: pathlib.Path, architecture: str, directory: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """Compiles one source to `directory`/<stem>.cubin. A spill or local memory is an error of ptxas.

    A changed header in `directory`/cuda comes before the right one.
    """
    command = [tool("nvcc"), "-std=c++20", "-O3", "-lineinfo", f"-I{directory}", f"-I{ROOT / 'csrc'}"]
    command += ["--expt-relaxed-constexpr", f"-arch={architecture}"]
    command += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]
    command += ["-cubin", str(source), "-o", str(directory / f"{source.stem}.cubin")]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=600)


def registers(log: str) -> list[int]:
    """Registers per thread of each kernel, as ptxas reports them."""
    return [int(count) for count in re.findall(r"Used (\d+) registers", log)]


def instructions(cubin: pathlib.Path) -> list[tuple[str, list[Instruction]]]:
    """Each kernel's name, without namespaces and template arguments, and its instructions."""
    command = [tool("nvdisasm"), "-gi", "-c", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kernels: list[tuple[str, list[Instruction]]] = []
    places: list[Place] = []
    complete = False
    for line in listing.splitlines():
        if name := _KERNEL.match(line):
            kernels.append((name.group(1), []))
        elif place := _LINE.search(line):
            if complete:
                places.clear()
            complete = False
            places.append(_place(place.group(1), int(place.group(2))))
        elif code := _INSTRUCTION.search(line):
            complete = True
            kernels[-1][1].append(Instruction(code.group(1), tuple(places)))
    return kernels


def _place(path: str, number: int) -> Place:
    lines = _lines(path)
    return lines[number - 1] if 0 < number <= len(lines) else Place("", "")


@cache
def _lines(path: str) -> list[Place]:
    """The lines of a source. Definitions start, and end with a brace, in its first column."""
    if pathlib.Path(path).parent.name != "cuda":
        return []
    function = ""
    places = []
    for text in pathlib.Path(path).read_text().splitlines():
        if definition := _DEFINITION.match(text):
            function = definition.group(1)
        places.append(Place(function, text))
        if text.startswith("}"):
            function = ""
    return places
