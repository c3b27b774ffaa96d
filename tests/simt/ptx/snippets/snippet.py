"""An instruction under test, in a kernel of its own, with what the PTX ISA says that it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

THREADS = 256
Row = tuple[int, ...]


@dataclass(frozen=True)
class Snippet:
    """PTX that makes %d and %f (of the types `gives`) of %a, %b, %c and %e (of the types `takes`).

    `oracle` does the same for one thread; with `together`, for the whole block: a list of results for one of
    operands. `prepare` changes operands for which the result is not defined.
    """

    code: str
    gives: str
    takes: str
    oracle: Callable[..., object]
    together: bool = False
    prepare: Callable[[Row], Row] = lambda row: row

    def kernel(self, name: str) -> str:
        """Its PTX. A thread has 32 bytes of input, and of output."""
        inputs = list(zip("abce", self.takes.split(), strict=False))
        outputs = list(zip("df", self.gives.split(), strict=False))
        lines = [f".reg .{kind} %{letter};" for letter, kind in inputs + outputs]
        lines += [".reg .b64 %in, %out, %q;", ".reg .b32 %t;", "mov.u32 %t, %tid.x;"]
        for pointer in ("in", "out"):
            lines.append(f"ld.param.u64 %{pointer}, [{name}_{pointer}];")
            lines.append(f"mad.wide.u32 %{pointer}, %t, 32, %{pointer};")
        for i, (letter, kind) in enumerate(inputs):
            to = {"pred": "setp.ne.s64 {}, %q, 0;", "b64": "mov.b64 {}, %q;"}
            lines += [
                f"ld.u64 %q, [%in+{8 * i}];",
                to.get(kind, f"cvt.u{kind[1:]}.u64 {{}}, %q;").format(f"%{letter}"),
            ]
        lines.append(self.code)
        for i, (letter, kind) in enumerate(outputs):
            back = {"pred": "selp.u64 %q, 1, 0, {};", "b64": "mov.b64 %q, {};"}
            lines += [
                back.get(kind, f"cvt.u64.u{kind[1:]} %q, {{}};").format(f"%{letter}"),
                f"st.u64 [%out+{8 * i}], %q;",
            ]
        body = "\n  ".join([*lines, "ret;"])
        return f".visible .entry {name}(.param .u64 {name}_in, .param .u64 {name}_out)\n{{\n  {body}\n}}\n"


def of(kind: str, bits: int) -> int:
    """How an instruction of type s32, for example, sees the bits of a register."""
    width = int(kind[1:])
    bits %= 1 << width
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits
