"""Turns a parsed PTX module into C++: one function per kernel, one call per instruction."""

from __future__ import annotations

import re
from typing import NoReturn

from tests.simt.ptx.instructions import DEFAULTS, FORMS, Form
from tests.simt.ptx.parser import (
    BYTES,
    Instruction,
    Kernel,
    Label,
    Location,
    Module,
    PtxError,
    Registers,
    Scope,
    Shared,
    Statement,
)

AXES = {
    f"%{name}.{axis}": f"T.{field}.{axis}"
    for name, field in {
        "tid": "thread_idx",
        "ctaid": "block_idx",
        "ntid": "block_dim",
        "nctaid": "grid_dim",
    }.items()
    for axis in "xyz"
}
SPECIAL_REGISTERS = {**AXES, "%laneid": "T.lane", "%warpid": "T.warp", "%globaltimer": "global_timer()"}


REGISTERS = {kind: f"b{8 * size}" for kind, size in BYTES.items() if size > 1} | {"pred": "pred"}


def identifier(name: str) -> str:
    """A PTX name as a C++ name that no function has."""
    return "v" + re.sub(r"\W", "_", name)


def literal(number: str) -> str | None:
    """A PTX number as C++: an integer, or the bits of a float."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", number):
        return f"0x{number[2:]}u"
    if not re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", number):
        return None
    value = int(number.rstrip("U"), 0)
    return str(value) if abs(value) < 1 << 63 else f"{value % (1 << 64)}u"


class Translator:
    """Translates one kernel."""

    def __init__(self, path: str, kernel: Kernel) -> None:
        """`path` is for messages."""
        self._path = path
        self._line = kernel.line
        self._kernel = kernel
        self._parameters = {parameter.name: parameter for parameter in kernel.parameters}
        self._scopes: list[set[str]] = [set()]  # registers and variables
        self._labels = {statement.name for _, statement in kernel.body if isinstance(statement, Label)}
        self._shared = 0

    def translate(self) -> str:
        """The C++ of the kernel, with its registration."""
        name, threads = self._kernel.name, self._kernel.max_threads
        body = []
        for line, statement in self._kernel.body:
            self._line = line
            body.append("  " + self._statement(statement))
        layout = ", ".join(f"{{{p.offset}, {p.bytes}}}" for p in self._kernel.parameters)
        return "\n".join(
            [
                f'extern "C" void {name}();',
                f"static void ptx_{name}(const std::byte* const P) {{",
                "  const CudaThread& T = cur();",
                "  [[maybe_unused]] std::byte* const S = shared_window();",
                *body,
                "}",
                f'static const Registration registration_{name}(&{name}, "{name}", '
                f"ptx_{name}, {{{layout}}}, {threads});",
            ]
        )

    def _fail(self, message: str) -> NoReturn:
        raise PtxError(self._path, self._line, message)

    def _declare(self, name: str) -> str:
        if name in self._scopes[-1]:
            self._fail(f"{name} is declared twice")
        self._scopes[-1].add(name)
        return identifier(name)

    def _is_declared(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    # ---- statements ----------------------------------------------------------------------------------------

    def _statement(self, statement: Statement) -> str:
        if isinstance(statement, Instruction):
            return self._guarded(statement)
        if isinstance(statement, Label):
            return f"{identifier(statement.name)}:;"
        if isinstance(statement, Location):
            return f'\n#line {statement.line} "{statement.file}"' if statement.line > 0 else ""
        if isinstance(statement, Registers):
            if statement.type not in REGISTERS:
                self._fail(f"registers of type {statement.type}")
            kind = REGISTERS[statement.type]
            registers = ", ".join(f"{self._declare(name)} = undefined" for name in statement.names)
            return f"[[maybe_unused]] {kind} {registers};"
        if isinstance(statement, Shared):
            self._shared += 1
            return (
                f"static const char key{self._shared} = 0; "
                f"[[maybe_unused]] const b64 {self._declare(statement.name)} = "
                f"shared_variable(S, &key{self._shared}, {statement.bytes}, {statement.align});"
            )
        return self._scope(statement)

    def _scope(self, scope: Scope) -> str:
        if scope.opens:
            self._scopes.append(set())
            return "{"
        self._scopes.pop()
        return "}"

    def _guarded(self, instruction: Instruction) -> str:
        guard = f"if ({self._predicate(instruction.guard)}) " if instruction.guard else ""
        for form in FORMS:
            match = form.opcode.fullmatch(instruction.opcode)
            if match and self._fits(form, match, instruction.operands):
                return guard + self._call(form, match, instruction.operands)
        return self._fail(f"unknown instruction: {instruction}")

    @staticmethod
    def _fits(form: Form, match: re.Match[str], operands: list[str]) -> bool:
        """Whether the operands are as many as the form has, and vectors and addresses where it has them."""
        taken = [kind for kind in form.operands if kind not in "_S"]
        if len(taken) != len(operands):
            return False
        for kind, operand in zip(taken, operands, strict=True):
            if kind not in {"{": "vs", "[": "mx"}.get(operand[0], "dapwl"):
                return False
            elements = match.groupdict().get("elements")
            if kind in "vs" and elements and len(split_vector(operand)) != int(elements):
                return False
        return True

    def _call(self, form: Form, match: re.Match[str], operands: list[str]) -> str:
        groups = {**DEFAULTS, **{name: group for name, group in match.groupdict().items() if group}}
        remaining = iter(operands)
        first: list[str] = []
        last: list[str] = []
        for kind in form.operands:
            if kind == "_":
                first.append("nobody")
            elif kind == "S":
                first.append("S")
            elif kind == "m":
                first.append(self._pointer(next(remaining), groups))
            elif kind == "x":
                first.append(self._pointer(next(remaining), {**groups, "space": "shared"}))
            elif kind in "vs":
                elements = split_vector(next(remaining))
                last += [self._destination(e) if kind == "v" else self._value(e) for e in elements]
            else:
                first += self._operand(kind, next(remaining))
        call, arguments = form.call.format(**groups), ", ".join(first + last)
        return f"{call} {arguments};" if call in ("goto", "return") else f"{call}({arguments});"

    # ---- operands ------------------------------------------------------------------------------------------

    def _operand(self, kind: str, operand: str) -> list[str]:
        if kind == "d":
            return [self._destination(operand)]
        if kind == "w":
            return [self._destination(name.strip()) for name in operand.split("|")]
        if kind == "p":
            return [self._predicate(operand)]
        if kind == "l":
            if operand not in self._labels:
                self._fail(f"unknown label {operand}")
            return [identifier(operand)]
        return [self._value(operand)]

    def _destination(self, operand: str) -> str:
        if operand == "_":
            return "nobody"
        if not self._is_declared(operand):
            self._fail(f"unknown register {operand}")
        return identifier(operand)

    def _predicate(self, operand: str) -> str:
        return "!" * operand.startswith("!") + self._value(operand.removeprefix("!"))

    def _value(self, operand: str) -> str:
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if self._is_declared(operand):
            return identifier(operand)
        number = literal(operand)
        if number is None:
            self._fail(f"unknown operand {operand}")
        return number

    def _pointer(self, operand: str, groups: dict[str, str]) -> str:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            self._fail(f"unknown address {operand}")
        base, offset = match.group(1), int(match.group(2) or 0)
        space = groups.get("space")
        if space == "param":
            parameter = self._parameters.get(base)
            size = BYTES[groups["type"]] * int(groups.get("elements", 1))
            if parameter is None or not 0 <= offset <= parameter.bytes - size:
                self._fail(f"no such parameter: {operand}")
            return f"P + {parameter.offset + offset}"
        pointer = "shared_pointer(S, " if space == "shared" else "pointer("
        return f"{pointer}{self._value(base)}, {offset})"


def split_vector(operand: str) -> list[str]:
    """The elements of `{a, b}`."""
    return [element.strip() for element in operand.strip("{}").split(",")]


def translate(module: Module) -> str:
    """The C++ file of a module. Raises PtxError for what is not known."""
    parts = [
        f"// Made of {module.path} by ptx2cpp.",
        '#include "ptx/runtime/runtime.h"',
        "namespace simt::ptx {",
        *(Translator(module.path, kernel).translate() for kernel in module.kernels),
        "}",
    ]
    return "\n".join(parts) + "\n"
