"""docs/operations.md quotes messages as the program prints them, and knows every class of error."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_efa_ep import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
VALUE = "…"


def python_texts(source: str) -> Iterator[str]:
    """Yield every string of a module, with VALUE where one is put in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[-.\d]*[sdfg]", VALUE, node.value)


def cpp_texts(source: str) -> Iterator[str]:
    """Yield the literals of every statement, with VALUE where something stands between them."""
    source = re.sub(r"^\s*//.*$", "", source, flags=re.MULTILINE)
    literal = re.compile(r'"((?:[^"\\]|\\.)*)"')
    for statement in re.split(r";\n|\{\n", source):
        text, end = "", None
        for found in literal.finditer(statement):
            between = "" if end is None else statement[end : found.start()].strip().strip("+")
            text += (VALUE if between else "") + found.group(1).replace('\\"', '"')
            end = found.end()
        if text:
            yield text


def all_texts() -> list[str]:
    """Return every text of the package."""
    texts = [text for path in (ROOT / "vllm_efa_ep").rglob("*.py") for text in python_texts(path.read_text())]
    for suffix in ("*.h", "*.cpp"):
        texts += [text for path in (ROOT / "csrc").rglob(suffix) for text in cpp_texts(path.read_text())]
    return texts


TEXTS = all_texts()
QUOTED = [
    *(block.strip() for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)),
    *re.findall(r"^\| `(EFA EP[^`]*)` \|", PAGE, re.MULTILINE),
]


def is_printed(message: str) -> bool:
    """Whether one text of the package has the message's fixed parts, in order."""
    parts = [re.escape(part.strip()) for part in message.split(VALUE) if part.strip(" .,;:()[]")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


def test_the_page_quotes_messages() -> None:
    """Protects this file against a regular expression that finds nothing."""
    assert len(QUOTED) > 30
    assert not is_printed("rank … is gone: its process has not ended")


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_the_programs_own(message: str) -> None:
    """Whoever searches the page for what they see finds it."""
    assert is_printed(message)


def test_every_class_of_error_has_its_section() -> None:
    """But the base, which is never raised for a reason of its own."""
    names = [name for name, each in vars(errors).items() if isinstance(each, type)]
    missing = [
        name for name in names if name != "EfaEpError" and not re.search(rf"^## .*: {name}$", PAGE, re.M)
    ]
    assert not missing
