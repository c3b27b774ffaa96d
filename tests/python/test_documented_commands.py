"""Every shell command in README and docs works: nobody should copy a line that fails.

A command is run here, or checked by what runs it elsewhere: make's targets by make itself (they are what CI
runs), server command lines by the parser that would read them, cmake and ctest lines by their options.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_SERVE = re.compile(r"`((?:EFA_EP_\w+=\S+ )?vllm serve [^`]+)`")


def documented_commands() -> Iterator[tuple[str, str]]:
    """Yield (document, command line)."""
    for document in DOCUMENTS:
        text = document.read_text()
        lines = [line for block in SHELL_BLOCK.findall(text) for line in block.splitlines()]
        lines += INLINE_SERVE.findall(text) if document.name == "README.md" else []
        for line in lines:
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#"):
                yield document.name, command


COMMANDS = sorted(set(documented_commands()))


def test_documents_have_commands() -> None:
    """Protects this file against a regular expression that finds nothing."""
    assert {command for name, command in COMMANDS if name == "README.md"} >= {"make demo", "make test"}


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_documented_command(document: str, command: str, tmp_path: Path) -> None:
    """Each command is understood by the program that it names."""
    del document
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    checks = {
        "make": check_make,
        "vllm-efa-ep": check_own_command,
        "vllm": check_serve,
        "pip": check_install,
        "cmake": check_cmake,
        "ctest": check_cmake,
    }
    assert words[0] in checks, f"no check for `{command}`; add one"
    checks[words[0]](words, tmp_path)


def check_make(words: list[str], _: Path) -> None:
    """Accept what make would do."""
    result = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_own_command(words: list[str], _: Path) -> None:
    """Run it."""
    program = Path(sys.executable).parent / "vllm-efa-ep"
    result = subprocess.run([program, *words[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def check_serve(words: list[str], tmp_path: Path) -> None:
    """Let vLLM's own parser read it, with the plugin loaded."""
    program = tmp_path / "parse.py"
    program.write_text(
        "import sys\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
    )
    assert words[1] == "serve"
    arguments = ["--model", *words[2:]]
    result = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_install(words: list[str], _: Path) -> None:
    """Installing the checkout is what the set-up of these tests did; only that may be promised."""
    assert words[1] == "install"
    assert words[-1].strip("'") in {".", ".[bench]", ".[test]"}


def check_cmake(words: list[str], _: Path) -> None:
    """Accept sources, targets and options that exist."""
    cmake = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    for word in words:
        if word.startswith("-D"):
            assert f"({word[2:].split('=')[0]} " in cmake.replace("set(", "(").replace("option(", "("), word
    if "-S" in words:
        assert (ROOT / words[words.index("-S") + 1] / "CMakeLists.txt").exists()
    if "--target" in words:
        target = words[words.index("--target") + 1]
        assert (ROOT / "tests" / "cpp" / f"{target}.cpp").exists()
