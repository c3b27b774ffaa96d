"""Instructions of one thread: arithmetic, bits, comparison, formats of numbers, copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

from tests.simt.ptx.snippets.formats import BF16, E4M3, E5M2, F16, bits32, bits64, f16, f32, f64
from tests.simt.ptx.snippets.snippet import Row, Snippet, of


def integers() -> Iterator[Snippet]:
    """Arithmetic modulo 2^n."""

    def snippet(
        opcode: str, kind: str, function: Callable[..., int], result: int = 0, count: int = 2
    ) -> Snippet:
        width = int(kind[1:])
        result = result or width
        takes = [f"b{width}", f"b{width}", f"b{result}"][:count]

        def oracle(*x: int) -> int:
            return function(*(of(kind, v) for v in x)) % (1 << result)

        def prepare(row: Row) -> Row:  # no division by zero, none that overflows
            return (row[0], 3 if of(kind, row[1]) in (0, -1) else row[1], *row[2:])

        names = ", ".join(["%a", "%b", "%c"][:count])
        divides = opcode in ("div", "rem")
        return Snippet(
            f"{opcode}.{kind} %d, {names};", f"b{result}", " ".join(takes), oracle,
            prepare=prepare if divides else Snippet.prepare,
        )  # fmt: skip

    def quotient(a: int, b: int) -> int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        width = int(kind[1:])
        yield snippet("add", kind, lambda a, b: a + b)
        yield snippet("sub", kind, lambda a, b: a - b)
        yield snippet("mul.lo", kind, lambda a, b: a * b)
        yield snippet("mul.hi", kind, lambda a, b, w=width: a * b >> w)
        yield snippet("mad.lo", kind, lambda a, b, c: a * b + c, count=3)
        yield snippet("mad.hi", kind, lambda a, b, c, w=width: (a * b >> w) + c, count=3)
        yield snippet("min", kind, min)
        yield snippet("max", kind, max)
        yield snippet("div", kind, quotient)
        yield snippet("rem", kind, lambda a, b: a - b * quotient(a, b))
        if width < 64:
            yield snippet("mul.wide", kind, lambda a, b: a * b, 2 * width)
            yield Snippet(
                f"mad.wide.{kind} %d, %a, %b, %c;", f"b{2 * width}", f"b{width} b{width} b{2 * width}",
                lambda a, b, c, k=kind, w=width: (of(k, a) * of(k, b) + c) % (1 << 2 * w),
            )  # fmt: skip
        if kind[0] == "s":
            yield snippet("abs", kind, abs, count=1)
            yield snippet("neg", kind, lambda a: -a, count=1)


def bits() -> Iterator[Snippet]:
    """Logic, shifts, fields."""
    for width in (16, 32, 64):
        b, ones = f"b{width}", (1 << width) - 1
        yield Snippet(f"and.{b} %d, %a, %b;", b, f"{b} {b}", lambda x, y: x & y)
        yield Snippet(f"or.{b} %d, %a, %b;", b, f"{b} {b}", lambda x, y: x | y)
        yield Snippet(f"xor.{b} %d, %a, %b;", b, f"{b} {b}", lambda x, y: x ^ y)
        yield Snippet(f"not.{b} %d, %a;", b, b, lambda x, o=ones: x ^ o)
        yield Snippet(f"shl.{b} %d, %a, %b;", b, f"{b} b32", lambda x, n, o=ones: x << min(n, 64) & o)
        for kind in (f"u{width}", f"s{width}"):
            yield Snippet(
                f"shr.{kind} %d, %a, %b;", b, f"{b} b32",
                lambda x, n, k=kind, o=ones: of(k, x) >> min(n, 64) & o,
            )  # fmt: skip
    yield Snippet("and.pred %d, %a, %b;", "pred", "pred pred", lambda x, y: x & y)
    yield Snippet("or.pred %d, %a, !%b;", "pred", "pred pred", lambda x, y: x | (1 - y))
    yield Snippet("xor.pred %d, %a, %b;", "pred", "pred pred", lambda x, y: x ^ y)
    yield Snippet("not.pred %d, %a;", "pred", "pred", lambda x: 1 - x)
    for mode, amount in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        yield Snippet(
            f"shf.l.{mode}.b32 %d, %a, %b, %c;", "b32", "b32 b32 b32",
            lambda low, high, n, f=amount: ((high << 32 | low) << f(n) >> 32) % (1 << 32),
        )  # fmt: skip
        yield Snippet(
            f"shf.r.{mode}.b32 %d, %a, %b, %c;", "b32", "b32 b32 b32",
            lambda low, high, n, f=amount: ((high << 32 | low) >> f(n)) % (1 << 32),
        )  # fmt: skip
    for width in (32, 64):
        b = f"b{width}"
        yield Snippet(f"popc.{b} %d, %a;", "b32", b, lambda x: bin(x).count("1"))
        yield Snippet(f"clz.{b} %d, %a;", "b32", b, lambda x, w=width: w - x.bit_length())
        yield Snippet(f"brev.{b} %d, %a;", b, b, lambda x, w=width: int(f"{x:0{w}b}"[::-1], 2))
        yield Snippet(f"bfi.{b} %d, %a, %b, %c, %e;", b, f"{b} {b} b32 b32", lambda *x, w=width: _bfi(*x, w))
        for kind in (f"u{width}", f"s{width}"):
            yield Snippet(f"bfind.{kind} %d, %a;", "b32", b, lambda x, k=kind: _bfind(of(k, x)))
            yield Snippet(
                f"bfind.shiftamt.{kind} %d, %a;", "b32", b,
                lambda x, k=kind, w=width: _bfind(of(k, x), w - 1),
            )  # fmt: skip
            yield Snippet(f"bfe.{kind} %d, %a, %b, %c;", b, f"{b} b32 b32", lambda *x, k=kind: _bfe(*x, k))
    yield Snippet(
        "lop3.b32 %d, %a, %b, %c, 0xE4;", "b32", "b32 b32 b32", lambda x, y, z: _lop3(x, y, z, 0xE4)
    )
    yield Snippet("prmt.b32 %d, %a, %b, %c;", "b32", "b32 b32 b32", _prmt)


def _bfind(value: int, distance_from: int | None = None) -> int:
    bits = value if value >= 0 else ~value
    if bits == 0:
        return 0xFFFFFFFF
    place = bits.bit_length() - 1
    return place if distance_from is None else distance_from - place


def _bfe(value: int, position: int, length: int, kind: str) -> int:
    """The ISA's definition, bit by bit."""
    top, position, length = int(kind[1:]) - 1, position & 255, length & 255
    sign = value >> min(position + length - 1, top) & 1 if kind[0] == "s" and length else 0
    inside = [i < length and position + i <= top for i in range(top + 1)]
    return sum((value >> (position + i) & 1 if inside[i] else sign) << i for i in range(top + 1))


def _bfi(value: int, into: int, position: int, length: int, width: int) -> int:
    for i in range(length & 255):
        place = (position & 255) + i
        if place < width:
            into = into & ~(1 << place) | (value >> i & 1) << place
    return into


def _lop3(x: int, y: int, z: int, table: int) -> int:
    rows = [(x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1 for i in range(32)]
    return sum((table >> row & 1) << i for i, row in enumerate(rows))


def _prmt(x: int, y: int, selector: int) -> int:
    source = (y << 32 | x).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        chosen.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x < y or x > y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def choices() -> Iterator[Snippet]:
    """Comparison and selection."""
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        b = f"b{kind[1:]}"
        unsigned_names = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"} if kind[0] == "u" else {}
        for name, holds in COMPARISONS.items():
            for spelling in {name, unsigned_names.get(name, name)}:
                yield Snippet(
                    f"setp.{spelling}.{kind} %d, %a, %b;", "pred", f"{b} {b}",
                    lambda x, y, k=kind, h=holds: int(h(of(k, x), of(k, y))),
                )  # fmt: skip
        yield Snippet(f"selp.{kind} %d, %a, %b, %c;", b, f"{b} {b} pred", lambda x, y, p: x if p else y)
    for kind, number in (("f32", f32), ("f64", f64)):
        b = f"b{kind[1:]}"

        def unordered(x: float, y: float) -> bool:
            return math.isnan(x) or math.isnan(y)

        every: dict[str, Callable[[float, float], bool]] = {
            **COMPARISONS,
            **{f"{name}u": lambda x, y, h=h: unordered(x, y) or h(x, y) for name, h in COMPARISONS.items()},
            "num": lambda x, y: not unordered(x, y),
            "nan": unordered,
        }
        for name, holds in every.items():
            yield Snippet(
                f"setp.{name}.{kind} %d, %a, %b;", "pred", f"{b} {b}",
                lambda x, y, n=number, h=holds: int(h(n(x), n(y))),
            )  # fmt: skip


def floats() -> Iterator[Snippet]:
    """Arithmetic that is rounded once, and numbers of other formats."""

    def exact(operation: Callable[..., Fraction], special: Callable[..., float], *operands: float) -> int:
        if not all(math.isfinite(x) for x in operands):
            return bits32(special(*operands))
        result = operation(*(Fraction(x) for x in operands))
        # Of an exact zero, the sign is what floating point says.
        return bits32(result, math.copysign(1, special(*operands)) < 0 if result == 0 else False)

    def snippet(code: str, operation: Callable[..., Fraction], special: Callable[..., float]) -> Snippet:
        count = code.count("%") - 1
        takes = " ".join(["b32"] * count)
        return Snippet(code, "b32", takes, lambda *x: exact(operation, special, *(f32(v) for v in x)))

    yield snippet("add.rn.f32 %d, %a, %b;", lambda x, y: x + y, lambda x, y: x + y)
    yield snippet("sub.rn.f32 %d, %a, %b;", lambda x, y: x - y, lambda x, y: x - y)
    yield snippet("mul.rn.f32 %d, %a, %b;", lambda x, y: x * y, lambda x, y: x * y)
    yield snippet("mul.f32 %d, %a, %b;", lambda x, y: x * y, lambda x, y: x * y)
    yield snippet("fma.rn.f32 %d, %a, %b, %c;", lambda x, y, z: x * y + z, lambda x, y, z: x * y + z)
    yield Snippet("div.rn.f32 %d, %a, %b;", "b32", "b32 b32", lambda x, y: _quotient(f32(x), f32(y)))
    yield Snippet("rcp.rn.f32 %d, %a;", "b32", "b32", lambda x: _quotient(1.0, f32(x)))
    for kind, number, to_bits in (("f32", f32, bits32), ("f64", f64, bits64)):
        b = f"b{kind[1:]}"
        for name, sign in (("min", 1), ("max", -1)):
            yield Snippet(
                f"{name}.{kind} %d, %a, %b;", b, f"{b} {b}",
                lambda x, y, n=number, t=to_bits, s=sign: t(_first(n(x), n(y), s)),
            )  # fmt: skip
        yield Snippet(f"neg.{kind} %d, %a;", b, b, lambda x, w=int(kind[1:]): x ^ 1 << (w - 1))
        yield Snippet(f"abs.{kind} %d, %a;", b, b, lambda x, w=int(kind[1:]): x & ~(1 << (w - 1)))
    for name, form in (("bf16", BF16), ("f16", F16)):
        yield Snippet(f"cvt.rn.{name}.f32 %d, %a;", "b16", "b32", form.convert)
        yield Snippet(
            f"cvt.rn.{name}x2.f32 %d, %a, %b;", "b32", "b32 b32",
            lambda x, y, f=form: f.convert(x) << 16 | f.convert(y),
        )  # fmt: skip
    for name, form in (("e4m3", E4M3), ("e5m2", E5M2)):
        yield Snippet(
            f"cvt.rn.satfinite.{name}x2.f32 %d, %a, %b;", "b16", "b32 b32",
            lambda x, y, f=form: f.convert(x, saturate=True) << 8 | f.convert(y, saturate=True),
        )  # fmt: skip
    yield Snippet("cvt.f32.bf16 %d, %a;", "b32", "b16", lambda x: bits32(f32(x << 16)))
    yield Snippet("cvt.f32.f16 %d, %a;", "b32", "b16", lambda x: bits32(f16(x)))
    yield Snippet("cvt.f64.f32 %d, %a;", "b64", "b32", lambda x: bits64(f32(x)))
    for kind in ("s32", "u32", "s64", "u64"):
        for source, number in (("f32", f32), ("f64", f64)):
            yield Snippet(
                f"cvt.rzi.{kind}.{source} %d, %a;", f"b{kind[1:]}", f"b{source[1:]}",
                lambda x, n=number, k=kind, s=source: _integer(n(x), k, k[1:] == s[1:] == "32"),
            )  # fmt: skip
        yield Snippet(
            f"cvt.rn.f32.{kind} %d, %a;", "b32", f"b{kind[1:]}", lambda x, k=kind: bits32(Fraction(of(k, x)))
        )  # fmt: skip


def _integer(value: float, kind: str, is_short: bool) -> int:
    width = int(kind[1:])
    if math.isnan(value):
        return 0 if is_short else 1 << (width - 1)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    if math.isinf(value):
        return (high if value > 0 else low) % (1 << width)
    return max(low, min(high, math.trunc(value))) % (1 << width)


def _quotient(x: float, y: float) -> int:
    negative = math.copysign(1, x) * math.copysign(1, y) < 0
    sign = -1.0 if negative else 1.0
    if math.isnan(x) or math.isnan(y) or (x == 0 and y == 0) or (math.isinf(x) and math.isinf(y)):
        return bits32(math.nan)
    if math.isinf(x) or y == 0:
        return bits32(sign * math.inf)
    if math.isinf(y) or x == 0:
        return bits32(sign * 0.0)
    return bits32(Fraction(x) / Fraction(y), negative)


def _first(x: float, y: float, sign: int) -> float:
    if math.isnan(x) or math.isnan(y):
        return y if math.isnan(x) else x
    return min((x, y), key=lambda v: (sign * v, sign * math.copysign(1, v)))


def copies() -> Iterator[Snippet]:
    """Moves, vectors, conversions of integers."""
    yield Snippet("mov.b64 %d, {%a, %b};", "b64", "b32 b32", lambda x, y: y << 32 | x)
    yield Snippet("mov.b32 %d, {%a, %b};", "b32", "b16 b16", lambda x, y: y << 16 | x)
    yield Snippet("mov.b64 {%d, %f}, %a;", "b32 b32", "b64", lambda x: (x % (1 << 32), x >> 32))
    yield Snippet("mov.b32 {_, %d}, %a;", "b16", "b32", lambda x: x >> 16)
    yield Snippet("mov.b32 %d, 0f3FC00000;", "b32", "", lambda: bits32(1.5))
    yield Snippet("mov.b64 %d, -2;", "b64", "", lambda: 2**64 - 2)
    yield Snippet("mov.u64 %d, 0xFFFFFFFFFFFFFFF0;", "b64", "", lambda: 2**64 - 16)
    kinds = [f"{kind}{width}" for kind in "su" for width in (8, 16, 32, 64)]
    for to in kinds:
        for source in kinds:
            gives, takes = (f"b{max(16, int(kind[1:]))}" for kind in (to, source))
            yield Snippet(
                f"cvt.{to}.{source} %d, %a;", gives, takes,
                lambda x, t=to, s=source, g=int(gives[1:]): of(t, of(s, x)) % (1 << g),
            )  # fmt: skip


ARITHMETIC = [*integers(), *bits(), *choices(), *floats(), *copies()]
