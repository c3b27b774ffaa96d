"""Reads mutations.txt, which explains its format: bugs to plant in the CUDA kernels."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIST = pathlib.Path(__file__).with_name("mutations.txt")
KINDS = {
    "order", "barrier", "scope", "wait", "round", "lost", "bounds", "owner", "sum", "operand", "check",
    "bytes",
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One bug: `old` becomes `new` in `file`. `survives` explains why no test may find it, or is empty."""

    kind: str
    name: str
    file: pathlib.Path
    old: str
    new: str
    survives: str

    def mutant(self) -> str:
        """The file's text with the bug. Raises ValueError unless `old` is there exactly once."""
        text = self.file.read_text()
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"mutation {self.name!r}: its text occurs {count} times in {self.file}; adapt {LIST}"
            )
        return text.replace(self.old, self.new)


def read_mutations() -> list[Mutation]:
    """All mutations, in the list's order. Raises ValueError for a malformed or repeated one."""
    mutations = []
    file = ROOT
    for paragraph in LIST.read_text().split("\n\n"):
        head, *lines = paragraph.strip("\n").split("\n")
        if head.startswith("file "):
            file = ROOT / head.removeprefix("file ")
        elif any(line.startswith("-") for line in lines):
            kind, _, name = head.partition(": ")
            if kind not in KINDS or any(line[:1] not in ("-", "+", "=") for line in lines):
                raise ValueError(f"{LIST}: malformed mutation {head!r}")
            old, new, why = ("\n".join(ln[1:] for ln in lines if ln[0] == mark) for mark in "-+=")
            mutations.append(Mutation(kind, name, file, old, new, why.replace("\n", " ")))
    names = [mutation.name for mutation in mutations]
    if len(set(names)) != len(names):
        raise ValueError(f"{LIST}: two mutations of one name")
    return mutations
