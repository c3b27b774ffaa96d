"""Reads the text of a PTX module: kernels, their parameters and their statements, each with its line."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import NoReturn

BYTES = {f"{kind}{bits}": bits // 8 for kind in "usb" for bits in (8, 16, 32, 64)}
BYTES |= {"f32": 4, "f64": 8, "pred": 1}


class PtxError(Exception):
    """Something in a PTX file that is not understood: file, line and what."""

    def __init__(self, path: str, line: int, message: str) -> None:
        """`line` counts from 1."""
        super().__init__(f"{path}:{line}: {message}")


@dataclass(frozen=True)
class Registers:
    """A `.reg` declaration."""

    type: str
    names: list[str]


@dataclass(frozen=True)
class Shared:
    """A `.shared` variable."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Location:
    """A `.loc` directive: what follows comes from this line of a source file."""

    file: str
    line: int


@dataclass(frozen=True)
class Scope:
    """A brace: the opening or the closing one."""

    opens: bool


@dataclass(frozen=True)
class Label:
    """A place to branch to."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`. The guard is a predicate, perhaps with `!`, or empty."""

    guard: str
    opcode: str
    operands: list[str]

    def __str__(self) -> str:
        """As in the file, on one line."""
        return f"{'@' * bool(self.guard)}{self.guard} {self.opcode} {', '.join(self.operands)}".strip()


Statement = Registers | Shared | Location | Scope | Label | Instruction


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and its place in the parameter space: each is at its natural alignment."""

    name: str
    offset: int
    bytes: int


@dataclass
class Kernel:
    """An `.entry`. `body` has the line of every statement."""

    name: str
    line: int
    parameters: list[Parameter]
    max_threads: int = 1024
    body: list[tuple[int, Statement]] = field(default_factory=list)


@dataclass
class Module:
    """All kernels of a file."""

    path: str
    kernels: list[Kernel]


def split_operands(text: str) -> list[str]:
    """Splits at commas outside of brackets and braces."""
    return [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text) if part.strip()]


def _without_comments(text: str) -> str:
    """Keep lines where they are, and strings as they are: paths of files may contain ``//``."""

    def kept(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else "\n" * found.count("\n")

    return re.sub(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', kept, text, flags=re.S)


class Parser:
    """One pass over a file. What it does not know is a PtxError."""

    def __init__(self, path: str, text: str) -> None:
        """`text` is the file's content; `path` is for messages."""
        self._path = path
        self._text = _without_comments(text)
        self._line_ends = [match.start() for match in re.finditer("\n", self._text)]
        self._at = 0
        # .file directives stand at the end.
        self._files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', self._text, flags=re.M))

    def module(self) -> Module:
        """Reads the whole file."""
        kernels = []
        while not self._take(r"\Z"):
            if self._take(
                r"\.(?:version|target|address_size|file)\b[^\n]*|\.section\s+\.debug_\w+\s*\{[^}]*\}"
            ):
                continue
            if not (entry := self._take(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)\s*\(([^)]*)\)")):
                self._fail(f"unknown directive: {self._rest_of_line()}")
            kernel = Kernel(entry.group(1), self._line(entry.start()), self._parameters(entry.group(2)))
            self._tuning(kernel)
            self._body(kernel)
            kernels.append(kernel)
        if not kernels:
            self._fail("no kernel in this file")
        return Module(self._path, kernels)

    def _line(self, at: int) -> int:
        return bisect.bisect_left(self._line_ends, at) + 1

    def _fail(self, message: str) -> NoReturn:
        raise PtxError(self._path, self._line(self._at), message)

    def _rest_of_line(self) -> str:
        return self._text[self._at :].partition("\n")[0].strip()

    def _take(self, pattern: str) -> re.Match[str] | None:
        """Reads what matches, after white space."""
        self._at = re.compile(r"\s*").match(self._text, self._at).end()  # type: ignore[union-attr]
        match = re.compile(pattern, re.S).match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def _parameters(self, text: str) -> list[Parameter]:
        parameters = []
        offset = 0
        for declaration in split_operands(text):
            match = re.fullmatch(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
                r"(?:\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?\s+)?(\w+)(?:\[(\d+)\])?",
                declaration,
            )
            if not match or match.group(2) not in BYTES:
                self._fail(f"unknown parameter: {declaration}")
            align, kind, name, count = match.groups()
            alignment = int(align or BYTES[kind])
            offset = -(-offset // alignment) * alignment
            size = BYTES[kind] * int(count or 1)
            parameters.append(Parameter(name, offset, size))
            offset += size
        return parameters

    def _tuning(self, kernel: Kernel) -> None:
        """Reads what stands between parameters and body: `__launch_bounds__`."""
        while not self._take(r"\{"):
            if threads := self._take(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?"):
                x, y, z = (int(count or 1) for count in threads.groups())
                kernel.max_threads = x * y * z
            elif not self._take(r"\.minnctapersm\s+\d+"):
                self._fail(f"unknown directive: {self._rest_of_line()}")

    def _body(self, kernel: Kernel) -> None:
        depth = 1
        while True:
            if brace := self._take(r"[{}]"):
                depth += 1 if brace.group() == "{" else -1
                if depth == 0:
                    return
                self._add(kernel, brace, Scope(brace.group() == "{"))
            elif label := self._take(r"([\w$]+):"):
                self._add(kernel, label, Label(label.group(1)))
            elif location := self._take(r"\.loc\s+(\d+)\s+(\d+)[^\n]*"):
                file, line = location.groups()
                if file not in self._files:
                    self._fail(f"file {file} is not in the list of files")
                self._add(kernel, location, Location(self._files[file], int(line)))
            elif statement := self._take(r"[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*;"):
                text = " ".join(statement.group()[:-1].split())
                if text != '.pragma "nounroll"':
                    self._add(kernel, statement, self._statement(statement.start(), text))
            else:
                self._fail(f"kernel {kernel.name} has no end: {self._rest_of_line()}")

    def _add(self, kernel: Kernel, match: re.Match[str], statement: Statement) -> None:
        kernel.body.append((self._line(match.start()), statement))

    def _statement(self, start: int, text: str) -> Statement:
        if registers := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
            names = []
            for name in split_operands(registers.group(2)):
                many = re.fullmatch(r"([%\w]+)<(\d+)>", name)
                names += [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]
            return Registers(registers.group(1), names)
        if shared := re.fullmatch(r"\.shared \.align (\d+) \.(\w+) (\w+)(?:\[(\d+)\])?", text):
            align, kind, name, count = shared.groups()
            if kind in BYTES:
                return Shared(name, BYTES[kind] * int(count or 1), int(align))
        instruction = re.fullmatch(r"(?:@(!?%?\w+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if not instruction:
            raise PtxError(self._path, self._line(start), f"unknown statement: {text}")
        guard, opcode, operands = instruction.groups()
        return Instruction(guard or "", opcode, split_operands(operands or ""))


def parse(path: str, text: str) -> Module:
    """Reads a PTX module. Raises PtxError."""
    return Parser(path, text).module()
