"""docs/robustness.md names tests that exist, and every line of it has some."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LINES = [
    line
    for line in (ROOT / "docs" / "robustness.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| elsewhere")
]
_NAMED = re.compile(r"`(tests/[\w/.]+)::([\w.]+)`")
TESTS = sorted({named for line in _LINES for named in _NAMED.findall(line)})


def test_every_line_names_a_test() -> None:
    """Protects the next test against a list that it cannot read."""
    assert len(_LINES) >= 20
    assert [line for line in _LINES if not _NAMED.search(line)] == []


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_a_named_test_exists(path: str, name: str) -> None:
    """A Python function, a GoogleTest case as Suite.Name, or the entry of a fuzz target."""
    text = (ROOT / path).read_text()
    suite, _, case = name.rpartition(".")
    found = rf"^TEST(?:_[FP])?\({suite}, {case}\)" if suite else rf"^(?:def|extern \"C\" int) {name}\("
    assert re.search(found, text, re.MULTILINE), f"{path} has no {name}"
