"""What the translated instructions do, against the oracles.

EFA_EP_SNIPPET is the driver's path: CTest sets it.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess

import pytest

from tests.simt.ptx.snippets.collection import SNIPPETS
from tests.simt.ptx.snippets.snippet import THREADS, Row, Snippet

SEED = int(os.environ.get("TEST_SEED", "1"))
EDGES = [0, 1, 2, 3, 7, 15, 31, 32, 33, 63, 64, 127, 128, 255, 256]
EDGES += [x for width in (16, 32, 64) for x in ((1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1)]
# float32: zeros, ones, subnormals, the ends of the formats, ties, infinities, NaN
EDGES += [0x80000000, 0x3F800000, 0xBF800000, 1, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001]
EDGES += [
    0x43E00000,
    0x43E80000,
    0x43F00000,
    0xC3E80001,
    0x477FE000,
    0x477FF000,
    0x33000000,
    0x3F808000,
    0x3F818000,
]
# float64: one, the largest number, infinities, NaN
EDGES += [0x3FF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000001]


def _operand(kind: str, numbers: random.Random) -> int:
    width = 1 if kind == "pred" else int(kind[1:])
    value = numbers.choice([numbers.choice(EDGES), numbers.getrandbits(64), numbers.getrandbits(64) >> 32])
    if width == 32 and numbers.random() < 0.3:  # floats of like size
        value = numbers.choice([0, 1]) << 31 | numbers.randint(100, 150) << 23 | numbers.getrandbits(23)
    return value % (1 << width)


def _rows(snippet: Snippet) -> list[Row]:
    numbers = random.Random(f"{SEED} {snippet.code}")
    kinds = snippet.takes.split()
    rows = [tuple(_operand(kind, numbers) for kind in kinds) for _ in range(THREADS)]
    if kinds == ["pred"] and numbers.random() < 0.5:  # votes: one of a kind
        rows = [(int(i != 77),) for i in range(THREADS)]
    return [snippet.prepare(row) for row in rows]


def _run(name: str, rows: list[Row]) -> list[Row]:
    image = b"".join(struct.pack("<4Q", *row, *[0] * (4 - len(row))) for row in rows)
    done = subprocess.run(
        [os.environ["EFA_EP_SNIPPET"], name], input=image, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return list(struct.iter_unpack("<4Q", done.stdout))


@pytest.mark.parametrize("name", SNIPPETS, ids=lambda name: SNIPPETS[name].code.split("\n")[0])
def test_does_what_the_isa_says(name: str) -> None:
    """256 threads, with edges and random operands."""
    snippet = SNIPPETS[name]
    rows = _rows(snippet)
    wanted = snippet.oracle(rows) if snippet.together else [snippet.oracle(*row) for row in rows]
    for i, (row, got, want) in enumerate(zip(rows, _run(name, rows), wanted, strict=True)):
        results = want if isinstance(want, tuple) else (want,)
        assert got[: len(results)] == results, (
            f"thread {i}, TEST_SEED={SEED}: {snippet.code} of {[hex(x) for x in row]} gives "
            f"{[hex(x) for x in got[: len(results)]]} instead of {[hex(x) for x in results]}"
        )
