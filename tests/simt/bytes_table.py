"""Writes the table of bytes per half into docs/performance.md, from what simt_bytes_test counts.

Times are computed: the counted bytes, divided by the rates that NVIDIA states for the GPU. No GPU takes part.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
from dataclasses import dataclass

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/performance.md"
BEGIN = "<!-- written by python -m tests.simt.bytes_table -->\n"
END = "<!-- end -->\n"
TOKENS = (128, 4096)  # per GPU: a decode step, a prefill


@dataclass(frozen=True)
class Gpu:
    """Rates in bytes per second: of memory, and of NVLink in one direction."""

    name: str
    memory: float
    nvlink: float


# https://www.nvidia.com/en-us/data-center/h200/: 4.8 TB/s; NVLink 900 GB/s, both directions together
# https://www.nvidia.com/en-us/data-center/dgx-b200/: eight GPUs have 64 TB/s, and NVLink 14.4 TB/s
GPUS = (Gpu("H200", 4.8e12, 450e9), Gpu("B200", 8e12, 900e9))


@dataclass(frozen=True)
class Count:
    """Bytes per token that a half reads and writes in one place, and the least that it has to."""

    half: str
    place: str
    read: int
    written: int
    least_read: int
    least_written: int


def count(program: pathlib.Path) -> list[Count]:
    """Runs the test. Raises CalledProcessError if it fails: then what is counted is not the least."""
    command = [program, "--gtest_filter=Bytes.OfDeepSeekV3"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = re.findall(r"^bytes per token: (\w+), ([\w ]+), (\d+), (\d+), (\d+), (\d+)$", output, re.MULTILINE)
    return [Count(half, place, *map(int, numbers)) for half, place, *numbers in rows]


def table_of_bytes(counts: list[Count]) -> str:
    """Half x place."""
    lines = ["| half | where | read | written | least |", "|---|---|---|---|---|"]
    for c in counts:
        least = " + ".join(f"{n}" for n in (c.least_read, c.least_written) if n)
        lines.append(f"| `{c.half}` | {c.place} | {c.read or ''} | {c.written or ''} | {least} |")
    return "\n".join(lines) + "\n"


def microseconds(counts: list[Count], half: str, gpu: Gpu, tokens: int) -> tuple[float, float]:
    """The times that the bytes of a half take in a GPU's memory, and on NVLink.

    All ranks do the same: what a rank reads of its peers' memory, they read of its own.
    """
    of_half = [c for c in counts if c.half == half]
    memory = sum(c.read + c.written for c in of_half)
    nvlink = sum(c.read + c.written for c in of_half if c.place.startswith("peer"))
    return 1e6 * tokens * memory / gpu.memory, 1e6 * tokens * nvlink / gpu.nvlink


def table_of_times(counts: list[Count]) -> str:
    """Half x GPU and tokens."""
    columns = [(gpu, tokens) for gpu in GPUS for tokens in TOKENS]
    lines = [
        "| half | " + " | ".join(f"{gpu.name}, {tokens} tokens" for gpu, tokens in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for half in dict.fromkeys(c.half for c in counts):
        times = [microseconds(counts, half, gpu, tokens) for gpu, tokens in columns]
        cells = " | ".join(f"{memory:.1f} / {nvlink:.1f} µs" for memory, nvlink in times)
        lines.append(f"| `{half}` | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=pathlib.Path, help="simt_bytes_test")
    counts = count(parser.parse_args().program)
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table_of_bytes(counts)}\n{table_of_times(counts)}\n{END}{after}")


if __name__ == "__main__":
    main()
