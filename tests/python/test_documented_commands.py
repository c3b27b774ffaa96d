"""Every shell command in README and docs works: nobody should copy a line that fails.

A command is run here, or checked by what runs it elsewhere: make's targets by make itself (they are what CI
runs), server command lines by the parser that would read them, cmake and ctest lines by their options.
"""

import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_BLOCK = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
FILE_BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
INLINE_SERVE = re.compile(r"`((?:EFA_EP_\w+=\S+ )?vllm serve [^`]+)`")


def documented_commands() -> Iterator[tuple[str, str]]:
    """Yield (document, command line); documents are named from the root."""
    for document in DOCUMENTS:
        text = document.read_text()
        lines = [line for block in SHELL_BLOCK.findall(text) for line in block.splitlines()]
        lines += INLINE_SERVE.findall(text) if document.name == "README.md" else []
        for line in lines:
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#"):
                yield str(document.relative_to(ROOT)), command


COMMANDS = sorted(set(documented_commands()))


def test_documents_have_commands() -> None:
    """Protects this file against a regular expression that finds nothing."""
    assert {command for name, command in COMMANDS if name == "README.md"} >= {"make demo", "make test"}


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_documented_command(document: str, command: str, tmp_path: Path) -> None:
    """Each command is understood by the program that it names, in a folder with the files of its document."""
    for name, content in FILE_BLOCK.findall((ROOT / document).read_text()):
        if "/" not in name:
            (tmp_path / name).write_text(content)
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
        "python": check_module,
        "torchrun": check_torchrun,
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


SERVE_PARSER = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
for words in json.loads(sys.argv[1]):
    parser.parse_args(words)
"""


def check_serve(words: list[str], tmp_path: Path) -> None:
    """Let vLLM's own parser read all such lines at once, with the plugin loaded: it starts slowly."""
    del tmp_path
    assert words[1] == "serve"
    assert parsed_serve_lines() == ""


@functools.cache
def parsed_serve_lines() -> str:
    """Return what vLLM says against the documented lines."""
    lines = [
        words[words.index("vllm") + 1 :] for _, line in COMMANDS if "vllm" in (words := shlex.split(line))
    ]
    command = [sys.executable, "-c", SERVE_PARSER, json.dumps(lines)]
    result = subprocess.run(command, capture_output=True, text=True)
    return "" if result.returncode == 0 else result.stderr[-4000:]


def check_install(words: list[str], _: Path) -> None:
    """Installing the checkout is what the set-up of these tests did; only that may be promised."""
    assert words[1] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[-1] in {".", *(f".[{extra}]" for extra in extras)}


def check_module(words: list[str], _: Path) -> None:
    """Let the module explain itself: it exists, and its imports and options do."""
    assert words[1] == "-m"
    command = [sys.executable, *words[1:3], "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in [word.split("=")[0] for word in words[3:] if word.startswith("--")]:
        assert option in result.stdout


def check_torchrun(words: list[str], tmp_path: Path) -> None:
    """Run it, on the file that the document shows."""
    # On any free port, not on torchrun's own, where somebody else's run may be.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"rank \d: \d+ rows for 4 experts, error 0\.0", result.stdout)) == 2, result.stdout


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
