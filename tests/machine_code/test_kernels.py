"""The machine code that nvcc makes of csrc/cuda keeps to the gates, on every architecture."""

import concurrent.futures
import os
import pathlib

import pytest

from tests.machine_code import gates, sass

FROM_SM_90 = {gates.acquires_wait_for_no_writes, gates.in_bulk_where_listed}
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a", "sm_103a"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[tuple[str, list[sass.Instruction]]]]:
    """The log of every source, and all kernels."""
    sass.tool("nvdisasm")
    directory = tmp_path_factory.mktemp(request.param)

    def compile_one(source: pathlib.Path) -> tuple[str, list[tuple[str, list[sass.Instruction]]]]:
        done = sass.compile_kernels(source, request.param, directory)
        assert done.returncode == 0, done.stderr
        return done.stderr, sass.instructions(directory / f"{source.stem}.cubin")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        logs, kernels = zip(*pool.map(compile_one, sass.SOURCES), strict=True)
    return list(logs), [kernel for of_source in kernels for kernel in of_source]


def test_registers_leave_room_for_four_blocks_per_sm(
    compiled: tuple[list[str], list[tuple[str, list[sass.Instruction]]]],
) -> None:
    """Blocks of both channels, and of the caller, fit one SM."""
    used = [count for log in compiled[0] for count in sass.registers(log)]
    assert len(used) == len(compiled[1]) >= 18
    assert max(used) <= gates.MOST_REGISTERS


@pytest.mark.parametrize(
    "gate",
    [
        gates.no_local_memory,
        gates.sixteen_bytes_at_a_time,
        gates.in_bulk_where_listed,
        gates.releases_where_listed,
        gates.acquires_wait_for_no_writes,
    ],
)
def test_gates(
    gate: gates.Gate,
    compiled: tuple[list[str], list[tuple[str, list[sass.Instruction]]]],
    request: pytest.FixtureRequest,
) -> None:
    """Each kernel keeps to each gate."""
    if gate in FROM_SM_90 and "sm_80" in request.node.name:
        pytest.skip("sm_80 has no fences of one side, and no copy engine")
    assert {name for name, _ in compiled[1]} == set(gates.RELEASES)
    for kernel, code in compiled[1]:
        gate(kernel, code)
