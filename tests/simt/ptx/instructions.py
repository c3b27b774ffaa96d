"""The instructions that are known: for each form, the function of runtime/ that does the same.

A form is a regular expression for the whole opcode, so one unknown modifier makes the instruction unknown.
Modifiers that need nothing on a CPU are cache hints, `.aligned`, `.uni` and `.global`. Some forms that look
simple are left out: `.ftz` and approximations, whose results are the GPU's own, and `add.f32` and `sub.f32`
without `.rn`, which the assembler may contract with a `mul.f32` without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INTEGER = r"\.(?P<type>[us](?:16|32|64))"
WIDE = r"\.(?P<type>[us](?:32|64))"  # integers that atomics and bit fields exist for
BITS = r"\.(?P<type>b(?:16|32|64))"
WIDE_BITS = r"\.(?P<type>b(?:32|64))"
FLOAT = r"\.(?P<type>f32|f64)"
REGISTER = r"\.(?P<type>[bus](?:16|32|64)|f32|f64)"
IN_MEMORY = r"\.(?P<type>[bus](?:8|16|32|64)|f32|f64)"
FROM_INTEGER = r"\.(?P<source>[us](?:8|16|32|64))"

VECTOR = r"\.v(?P<elements>[24])"
SPACE = r"(?:\.(?:global|(?P<space>shared)))?"
HINTS = r"(?:\.L1::(?:no_allocate|evict_\w+)|\.L2::\d+B)*"
SCOPE = r"\.(?P<scope>cta|gpu|sys)"
ATOMIC = rf"(?:\.(?P<order>relaxed|acquire|release|acq_rel))?(?:{SCOPE})?{SPACE}"
DEFAULTS = {"order": "relaxed", "scope": "gpu"}  # of atom and red


@dataclass(frozen=True)
class Form:
    """One form of an instruction.

    `call` is the C++ function, with the groups of `opcode` filled in. It takes the operands in their order,
    but vectors last, element by element:

      d  destination register    a  register, number or variable    p  predicate, perhaps with `!`
      m  address                 v  vector to write                 s  vector to read
      x  address in shared memory, where the opcode names several spaces
      l  label                   w  two destinations, `d|p`, or the first one only
      _  is none: a result that the function gives and nobody wants
      S  is none: the start of the block's shared memory
    """

    opcode: re.Pattern[str]
    operands: list[str]
    call: str


def _form(opcode: str, operands: str, call: str) -> Form:
    return Form(re.compile(opcode), operands.split(), call)


FORMS = [
    # Integers
    _form(rf"(?P<op>add|sub|div|rem|min|max){INTEGER}", "d a a", "{op}<{type}>"),
    _form(rf"mul\.(?P<half>lo|hi){INTEGER}", "d a a", "mul_{half}<{type}>"),
    _form(rf"mad\.(?P<half>lo|hi){INTEGER}", "d a a a", "mad_{half}<{type}>"),
    _form(r"mul\.wide\.(?P<type>[us](?:16|32))", "d a a", "mul_wide<{type}>"),
    _form(r"mad\.wide\.(?P<type>[us](?:16|32))", "d a a a", "mad_wide<{type}>"),
    _form(r"(?P<op>abs|neg)\.(?P<type>s(?:16|32|64))", "d a", "{op}<{type}>"),
    # Floating point; what rounds says how
    _form(rf"(?P<op>add|sub|mul|div)\.rn{FLOAT}", "d a a", "{op}_rn<{type}>"),
    _form(rf"mul{FLOAT}", "d a a", "mul_rn<{type}>"),
    _form(rf"fma\.rn{FLOAT}", "d a a a", "fma_rn<{type}>"),
    _form(rf"(?P<op>rcp|sqrt)\.rn{FLOAT}", "d a", "{op}_rn<{type}>"),
    _form(rf"(?P<op>min|max){FLOAT}", "d a a", "{op}<{type}>"),
    _form(rf"(?P<op>abs|neg){FLOAT}", "d a", "{op}<{type}>"),
    # Bits
    _form(rf"(?P<op>and|or|xor){BITS}", "d a a", "bit_{op}<{type}>"),
    _form(r"(?P<op>and|or|xor)\.pred", "d p p", "bit_{op}<pred>"),
    _form(rf"not{BITS}", "d a", "bit_not<{type}>"),
    _form(r"not\.pred", "d p", "bit_not<pred>"),
    _form(rf"shl{BITS}", "d a a", "shl<{type}>"),
    _form(r"shr\.(?P<type>[bus](?:16|32|64))", "d a a", "shr<{type}>"),
    _form(r"shf\.(?P<side>l|r)\.(?P<mode>wrap|clamp)\.b32", "d a a a", "shf_{side}<Shift::{mode}>"),
    _form(rf"(?P<op>popc|clz|brev){WIDE_BITS}", "d a", "{op}<{type}>"),
    _form(rf"bfind{WIDE}", "d a", "bfind<{type}>"),
    _form(rf"bfind\.shiftamt{WIDE}", "d a", "bfind_shift_amount<{type}>"),
    _form(rf"bfe{WIDE}", "d a a a", "bfe<{type}>"),
    _form(rf"bfi{WIDE_BITS}", "d a a a a", "bfi<{type}>"),
    _form(r"prmt\.b32", "d a a a", "prmt"),
    _form(r"lop3\.b32", "d a a a a", "lop3"),
    # Choice
    _form(
        r"setp\.(?P<compare>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?P<type>[bus](?:16|32|64))",
        "d a a",
        "setp<Compare::{compare}, {type}>",
    ),
    _form(
        rf"setp\.(?P<compare>eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan){FLOAT}",
        "d a a",
        "setp<Compare::{compare}, {type}>",
    ),
    _form(rf"selp{REGISTER}", "d a a p", "selp<{type}>"),
    # Copies and conversions
    _form(rf"mov{REGISTER}", "d a", "mov<{type}>"),
    _form(r"mov\.pred", "d p", "mov<pred>"),
    _form(rf"mov{WIDE_BITS}", "d s", "pack<{type}>"),
    _form(rf"mov{WIDE_BITS}", "v a", "unpack<{type}>"),
    _form(r"cvta(?:\.to)?\.global\.u64", "d a", "mov<u64>"),
    _form(r"cvta\.shared\.u64", "d a S", "shared_to_generic"),
    _form(r"cvta\.to\.shared\.u64", "d a S", "generic_to_shared"),
    _form(rf"cvt\.(?P<type>[us](?:8|16|32|64)){FROM_INTEGER}", "d a", "cvt<{type}, {source}>"),
    _form(rf"cvt\.rn{FLOAT}{FROM_INTEGER}", "d a", "cvt<{type}, {source}>"),
    _form(
        r"cvt\.rzi\.(?P<type>[us](?:32|64))\.(?P<source>f32|f64)", "d a", "cvt_to_integer<{type}, {source}>"
    ),
    _form(r"cvt\.f64\.f32", "d a", "cvt<f64, f32>"),
    _form(r"cvt\.rn\.f32\.f64", "d a", "cvt<f32, f64>"),
    _form(r"cvt\.f32\.(?P<source>f16|bf16)", "d a", "f32_from_{source}"),
    _form(r"cvt\.rn\.(?P<type>f16|bf16)\.f32", "d a", "{type}_from_f32"),
    _form(r"cvt\.rn\.(?P<type>f16|bf16)x2\.f32", "d a a", "{type}x2_from_f32"),
    _form(r"cvt\.rn\.satfinite\.(?P<type>e4m3|e5m2)x2\.f32", "d a a", "{type}x2_from_f32"),
    # Memory: weak accesses, and those that synchronise
    _form(rf"ld(?:\.weak)?{SPACE}{HINTS}{IN_MEMORY}", "d m", "ld<{type}>"),
    _form(rf"ld(?:\.weak)?{SPACE}{HINTS}{VECTOR}{IN_MEMORY}", "v m", "ld<{type}>"),
    _form(rf"ld\.global\.nc{HINTS}{IN_MEMORY}", "d m", "ld<{type}>"),
    _form(rf"ld\.global\.nc{HINTS}{VECTOR}{IN_MEMORY}", "v m", "ld<{type}>"),
    _form(rf"ld\.(?P<space>param){IN_MEMORY}", "d m", "ld<{type}>"),
    _form(rf"ld\.(?P<space>param){VECTOR}{IN_MEMORY}", "v m", "ld<{type}>"),
    _form(rf"st(?:\.weak)?{SPACE}{HINTS}{IN_MEMORY}", "m a", "st<{type}>"),
    _form(rf"st(?:\.weak)?{SPACE}{HINTS}{VECTOR}{IN_MEMORY}", "m s", "st<{type}>"),
    _form(
        rf"ld\.(?P<order>relaxed|acquire){SCOPE}{SPACE}{HINTS}{IN_MEMORY}",
        "d m",
        "ld_strong<{type}, {order}, Scope::{scope}>",
    ),
    _form(
        rf"st\.(?P<order>relaxed|release){SCOPE}{SPACE}{HINTS}{IN_MEMORY}",
        "m a",
        "st_strong<{type}, {order}, Scope::{scope}>",
    ),
    _form(
        rf"st\.(?P<order>relaxed){SCOPE}{SPACE}{HINTS}{VECTOR}{IN_MEMORY}",
        "m s",
        "st_strong<{type}, {order}, Scope::{scope}>",
    ),
    *(
        _form(rf"{opcode}{ATOMIC}\.{operation}", f"{result} m {values}", call)
        for opcode, result in (("atom", "d"), ("red", "_"))
        for operation, values, call in (
            (rf"(?P<op>add|min|max){WIDE}", "a", "atom_{op}<{type}, {order}, Scope::{scope}>"),
            (rf"(?P<op>and|or){WIDE_BITS}", "a", "atom_{op}<{type}, {order}, Scope::{scope}>"),
            (rf"(?P<op>exch){WIDE_BITS}", "a", "atom_{op}<{type}, {order}, Scope::{scope}>"),
            (rf"(?P<op>cas){WIDE_BITS}", "a a", "atom_{op}<{type}, {order}, Scope::{scope}>"),
        )
    ),
    _form(rf"fence\.(?:sc|acq_rel){SCOPE}", "", "fence<acq_rel, Scope::{scope}>"),
    _form(rf"fence\.(?P<order>acquire|release){SCOPE}", "", "fence<{order}, Scope::{scope}>"),
    # The SM's copy engine
    _form(r"mbarrier\.init\.shared::cta\.b64", "x a", "mbarrier_init"),
    _form(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64", "d x a", "mbarrier_arrive_expect_tx"),
    _form(r"mbarrier\.try_wait\.parity\.shared::cta\.b64", "d x a", "mbarrier_try_wait_parity"),
    _form(r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes", "x m a x", "bulk_load"),
    _form(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group", "m x a", "bulk_store"),
    _form(r"cp\.async\.bulk\.commit_group", "", "bulk_commit_group"),
    _form(r"cp\.async\.bulk\.wait_group", "a", "bulk_wait_group"),
    _form(r"cp\.async\.bulk\.wait_group\.read", "a", "bulk_wait_group_read"),
    _form(r"fence\.proxy\.async", "", "fence_proxy_async"),
    # Threads
    _form(r"bra(?:\.uni)?", "l", "goto"),
    _form(r"ret|exit", "", "return"),
    _form(r"trap", "", "trap"),
    _form(r"nanosleep\.u32", "a", "nanosleep"),
    _form(r"bar(?:rier)?\.sync(?:\.aligned)?", "a", "barrier_sync"),
    _form(r"bar(?:rier)?\.sync(?:\.aligned)?", "a a", "barrier_sync"),
    _form(r"bar(?:rier)?\.arrive(?:\.aligned)?", "a a", "barrier_arrive"),
    _form(r"bar(?:rier)?\.red\.(?P<op>and|or)(?:\.aligned)?\.pred", "d a p", "barrier_{op}"),
    _form(r"bar\.warp\.sync", "a", "warp_sync"),
    _form(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32", "w a a a a", "shfl<Shuffle::{mode}>"),
    _form(r"vote\.sync\.(?P<op>any|all)\.pred", "d p a", "vote_{op}"),
    _form(r"vote\.sync\.ballot\.b32", "d p a", "vote_ballot"),
    _form(r"match\.any\.sync\.(?P<type>b32|b64)", "d a a", "match_any<{type}>"),
]
