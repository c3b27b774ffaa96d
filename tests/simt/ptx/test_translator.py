"""What ptx2cpp refuses, and how it says so: nothing that it does not know gets through."""

from __future__ import annotations

import pathlib

import pytest

from tests.simt.ptx.parser import PtxError, parse
from tests.simt.ptx.ptx2cpp import main
from tests.simt.ptx.translator import translate

KERNEL = """.version 9.0
.target sm_90a
.address_size 64

.visible .entry kernel(.param .u64 kernel_in, .param .align 8 .b8 kernel_struct[24])
.maxntid 256, 1, 1
{{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<4>;
	ld.param.u64 	%rd1, [kernel_in];
	{}
$end:
	ret;
}}
"""
LINE = 12  # of what is put into the kernel


def _translate(instruction: str) -> str:
    return translate(parse("kernel.ptx", KERNEL.format(instruction)))


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.s32.sat %r1, %r2, %r3;",
        "add.ftz.f32 %r1, %r2, %r3;",
        "add.f32 %r1, %r2, %r3;",
        "ex2.approx.f32 %r1, %r2;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, {%r2, %r3};",
        "add.s32 %r1, %r2, %r9;",
        "add.s32 %r1, %r2, %clock;",
        "add.s32 7, %r2, %r3;",
        "@%p7 add.s32 %r1, %r2, %r3;",
        "bra $nowhere;",
        "ld.volatile.u32 %r1, [%rd1];",
        "ld.relaxed.cluster.u32 %r1, [%rd1];",
        "ld.mmio.relaxed.sys.u32 %r1, [%rd1];",
        "ld.global.L3::no_allocate.u32 %r1, [%rd1];",
        "ld.global.v4.u32 {%r1, %r2, %r3}, [%rd1];",
        "st.acquire.sys.u32 [%rd1], %r1;",
        "ld.param.u64 %rd2, [kernel_struct+20];",
        "ld.param.u32 %r1, [kernel_nothing];",
        "activemask.b32 %r1;",
        "cp.async.commit_group;",
        "call.uni frobnicate, ();",
        ".local .align 4 .b8 stack[16];",
        ".reg .b128 %q;",
        ".reg .b32 %r1;",
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(instruction: str) -> None:
    """The message names file, line and instruction."""
    with pytest.raises(PtxError) as error:
        _translate(instruction)
    file, line, message = str(error.value).split(":", 2)
    assert (file, int(line)) == ("kernel.ptx", LINE)
    assert any(word.strip("@.[],;") in message for word in instruction.split())


@pytest.mark.parametrize(
    ("instead_of", "unknown"),
    [
        (".maxntid 256, 1, 1", ".reqnctapercluster 2"),
        (".visible .entry", ".global .u32 variable;\n.visible .entry"),
        (".visible .entry", ".func helper() {{ ret; }}\n.visible .entry"),
        (".param .u64 kernel_in", ".param .b128 kernel_in"),
        ("$end:\n\tret;\n}}", "$end:\n\tret;"),
        (".visible .entry kernel", "// .visible .entry kernel"),
    ],
)
def test_what_is_unknown_around_a_kernel_is_an_error(instead_of: str, unknown: str) -> None:
    """Directives, variables, functions, parameters, and a file that ends early."""
    assert instead_of in KERNEL
    with pytest.raises(PtxError):
        parse("kernel.ptx", KERNEL.replace(instead_of, unknown).format(""))


def test_what_is_known_gets_through() -> None:
    """The kernel of the other tests, which is in order but for their line."""
    code = _translate("@!%p1 ld.relaxed.sys.global.u32 %r1, [%rd1+-4];")
    assert "if (!v_p1) ld_strong<u32, relaxed, Scope::sys>(v_r1, pointer(v_rd1, -4));" in code
    assert "{{0, 8}, {8, 24}}, 256)" in code


def test_a_path_with_two_slashes_is_no_comment() -> None:
    """As nvcc names its own headers where it was installed as a wheel."""
    kernel = KERNEL.format(".loc 2 35 5\n\tadd.s32 %r1, %r2, %r3;")
    kernel += '.file 1 "bin/..//include/cuda_bf16.hpp"\n.file 2 "kernel.cuh" // the kernel\n'
    assert '#line 35 "kernel.cuh"' in translate(parse("kernel.ptx", kernel))


def test_the_command_writes_nothing_after_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, and the message on standard error."""
    source, target = tmp_path / "kernel.ptx", tmp_path / "kernel.cpp"
    source.write_text(KERNEL.format("frobnicate.b32 %r1;"))
    monkeypatch.setattr("sys.argv", ["ptx2cpp", str(source), str(target)])
    assert main() == 1
    assert f"{source}:{LINE}: unknown instruction: frobnicate.b32 %r1" in capsys.readouterr().err
    assert not target.exists()
