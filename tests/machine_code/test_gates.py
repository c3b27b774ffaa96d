"""The gates on machine code are shut: each refuses a kernel with a planted fault."""

import pathlib
from dataclasses import dataclass

import pytest

from tests.machine_code import gates, sass

ARCHITECTURE = "sm_90a"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a file of csrc/cuda, and a source that contains it is compiled."""

    file: str
    old: str
    new: str
    source: str


# A row loop with accesses that are too narrow, on the side of the reads and of the writes
NARROW = [
    Fault(
        "rows.cuh",
        "value[u] = dp::ld_nc(from + size_t{vector} * kVectorBytes);",
        "{ const auto* words = reinterpret_cast<const volatile uint2*>(from + size_t{vector} * kVectorBytes);"
        " value[u] = {words[0].x, words[0].y, words[1].x, words[1].y}; }",
        "dispatch_send.cu",
    ),
    Fault(
        "sums.cuh",
        "if (!copy && is_in_row) dp::st_na(out + at, pack<kType>(total));",
        "const uint4 sum = pack<kType>(total); auto* words = reinterpret_cast<volatile uint32_t*>(out + at);"
        " words[0] = sum.x; words[1] = sum.y; words[2] = sum.z; words[3] = sum.w;",
        "combine_send.cu",
    ),
]
# Payloads leave the copy engine's stages through registers, or terms are read beside them
THROUGH_REGISTERS = [
    Fault(
        "payloads.cuh",
        "dp::bulk_store(to.row[i] + offset, piece, bytes);",
        "dp::st_na(to.row[i] + offset, dp::ld_na(piece));",
        "dispatch_recv.cu",
    ),
    Fault(
        "sums.cuh",
        "vector = reinterpret_cast<const uint4*>(piece)[lane_id()];",
        "vector = dp::ld_na(terms.row[term] + at);",
        "combine_recv.cu",
    ),
]
# A release per row, a second one per chunk, one for every flag of a list that one would do for, and none
RELEASES = [
    Fault(
        "submit.cuh",
        "  const Chunking chunking = chunking_of(at, operation, rows);\n",
        "  dp::fence_release_sys();\n  const Chunking chunking = chunking_of(at, operation, rows);\n",
        "dispatch_send.cu",
    ),
    Fault(
        "submit.cuh", "  dp::fence_release_sys();\n", "  dp::fence_release_sys();\n" * 2, "combine_send.cu"
    ),
    Fault(
        "dispatch_recv.cu",
        "    write_list(set, tiles_of(rows), row_list(at, device.index, source_node, owner));\n",
        "    write_list(set, tiles_of(rows), row_list(at, device.index, source_node, owner));\n"
        "    dp::fence_release_sys();\n",
        "dispatch_recv.cu",
    ),
    Fault("combine_send.cu", "dp::st_release_sys(flag,", "dp::st_relaxed_sys(flag,", "combine_send.cu"),
]
# An acquire that is a release as well
ACQUIRE = Fault("device_primitives.cuh", "fence.acquire.sys;", "fence.acq_rel.sys;", "combine_recv.cu")
# Room for fewer blocks: the compiler takes more registers.
REGISTERS = Fault("kernel.cuh", "kBlocksPerSm = 4;", "kBlocksPerSm = 1;", "combine_recv.cu")
SUM = (
    "      sum_rows<kType>(reads, result, terms[warp_id()], count,"
    " static_cast<uint32_t>(device.combine_row));\n"
)
# A row's numbers are kept for later in more registers than there are: ptxas spills.
SPILL = Fault(
    "combine_send.cu",
    SUM,
    "      uint4 kept[32];\n"
    "#pragma unroll\n"
    "      for (uint32_t i = 0; i < 32; ++i) kept[i] = dp::ld_na(terms[warp_id()].row[0] + 16 * i);\n"
    "      __syncwarp();\n"
    "#pragma unroll\n"
    "      for (uint32_t i = 0; i < 32; ++i) dp::st_na(result + 16 * i, kept[31 - i]);\n",
    "combine_send.cu",
)
# An array whose index the compiler does not know
LOCAL = Fault(
    "combine_send.cu",
    SUM,
    "      uint32_t places[8];\n"
    "      for (uint32_t i = 0; i < 8; ++i) places[(i * count) % 8] = row + i;\n"
    "      sum_rows<kType>(reads, result, terms[warp_id()], places[count % 8], places[row % 8]);\n",
    "combine_send.cu",
)


def _compile(fault: Fault, directory: pathlib.Path) -> tuple[int, str, pathlib.Path]:
    changed = directory / "cuda" / fault.file
    changed.parent.mkdir()
    text = (sass.ROOT / "csrc/cuda" / fault.file).read_text()
    assert text.count(fault.old) == 1, "adapt the fault to the kernel"
    changed.write_text(text.replace(fault.old, fault.new))
    source = changed if fault.file == fault.source else sass.ROOT / "csrc/cuda" / fault.source
    done = sass.compile_kernels(source, ARCHITECTURE, directory)
    return done.returncode, done.stderr, directory / f"{source.stem}.cubin"


def _keeps_to(gate: gates.Gate, cubin: pathlib.Path) -> bool:
    try:
        for kernel, code in sass.instructions(cubin):
            gate(kernel, code)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("fault", "gate"),
    [(fault, gates.sixteen_bytes_at_a_time) for fault in NARROW]
    + [(fault, gates.in_bulk_where_listed) for fault in THROUGH_REGISTERS]
    + [(fault, gates.releases_where_listed) for fault in RELEASES]
    + [(ACQUIRE, gates.acquires_wait_for_no_writes)],
)
def test_a_planted_fault_is_refused(fault: Fault, gate: gates.Gate, tmp_path: pathlib.Path) -> None:
    """The compiler takes the fault, and the gate for it refuses the code."""
    sass.tool("nvdisasm")
    status, log, cubin = _compile(fault, tmp_path)
    assert status == 0, log
    assert not _keeps_to(gate, cubin)


@pytest.mark.parametrize("fault", [SPILL, LOCAL])
def test_a_planted_spill_is_refused_by_the_compiler(fault: Fault, tmp_path: pathlib.Path) -> None:
    """What does not fit the registers is an error of ptxas."""
    status, log, _ = _compile(fault, tmp_path)
    assert status != 0
    assert "spill" in log or "ocal memory" in log, log


def test_too_many_registers_are_refused(tmp_path: pathlib.Path) -> None:
    """A kernel that takes what one block per SM may have is over the limit."""
    status, log, _ = _compile(REGISTERS, tmp_path)
    assert status == 0, log
    assert max(sass.registers(log)) > gates.MOST_REGISTERS
