"""What the machine code of csrc/cuda keeps to: fixed here, so that a change that costs shows in review."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from tests.machine_code.sass import Instruction

Gate = Callable[[str, list[Instruction]], None]

MOST_REGISTERS = 64

# Where payloads are read and written, and that both are there.
PAYLOAD = {
    "stage_tokens": ("copy_vectors", "quantise_row"),
    "pack_rows": ("copy_vectors",),
    "reduce_rows": ("sum_rows", "sum_terms"),
    "sum_rail": ("sum_rows", "sum_terms"),
    "gather_tokens": ("sum_rows", "sum_terms"),
}
_GLOBAL = re.compile(r"(LDG?|STG?|ATOM\w*|RED\w*)(\..*)?")
_LOAD = re.compile(r"LDG?\..*\.128(\..*)?")
_STORE = re.compile(r"STG?\..*\.128(\..*)?")
# What the SM's copy engine does where there is one: reads rows into shared memory, and copies them from there
_BULK_LOAD = "UBLKCP.S.G"
_BULK_STORE = "UBLKCP.G.S"
IN_BULK = {
    "pack_rows": {_BULK_LOAD, _BULK_STORE},
    "reduce_rows": {_BULK_LOAD},
    "sum_rail": {_BULK_LOAD},
    "gather_tokens": {_BULK_LOAD},
}
_SCALE = re.compile(r"\bscales\)?\[")

# System-scope releases make an SM wait for all its writes, so each is listed: one in submit(), which hands
# over a chunk, and one where the flag of a (pair, half) is raised. How often these places are passed counts
# Releases.AreOnePerChunkAndPair in tests/simt.
_SUBMIT = {"submit in submit_empty": 1, "submit in row_is_ready": 1}
RELEASES: dict[str, dict[str, int]] = {
    "route_tokens": {},
    "stage_tokens": {**_SUBMIT, "publish_lists": 1},
    "forward_slots": {"forward_slot": 1},
    "take_rows": {},
    "pack_rows": {},
    "reduce_rows": {**_SUBMIT, "publish_results": 1},
    "sum_rail": _SUBMIT,
    "gather_tokens": {},
}
_FENCE = re.compile(r"MEMBAR\..*SYS")


def no_local_memory(kernel: str, code: list[Instruction]) -> None:
    """Nothing is spilled, and no array lies in local memory."""
    assert not [i.name for i in code if re.fullmatch(r"(LDL|STL)(\..*)?", i.name)], kernel


def sixteen_bytes_at_a_time(kernel: str, code: list[Instruction]) -> None:
    """The loops over a row's payload touch global memory 16 bytes at a time, and in no other way."""
    if kernel not in PAYLOAD:
        return
    loops = [i for i in code if any(i.is_from(function) for function in PAYLOAD[kernel])]
    accesses = [i for i in loops if _GLOBAL.fullmatch(i.name)]
    # One scale per 128 values is no part of the payload.
    payload = [i.name for i in accesses if not any(_SCALE.search(place.text) for place in i.places)]
    narrow = {name for name in payload if not (_LOAD.fullmatch(name) or _STORE.fullmatch(name))}
    assert not narrow, f"{kernel}: {narrow}"
    bulk = [i.name for i in code]
    assert _BULK_LOAD in bulk or any(_LOAD.fullmatch(name) for name in payload), kernel
    assert _BULK_STORE in bulk or any(_STORE.fullmatch(name) for name in payload), kernel


def in_bulk_where_listed(kernel: str, code: list[Instruction]) -> None:
    """What is under way takes no registers. For targets with a copy engine: from sm_90 on."""
    bulk = {i.name for i in code if i.name.startswith("UBLKCP")}
    assert bulk == IN_BULK.get(kernel, set()), kernel
    if kernel in IN_BULK:
        payload = [i for i in code if i.is_from("copy_vectors") or i.is_from("sum_terms")]
        assert not [i.name for i in payload if _LOAD.fullmatch(i.name)], kernel


def releases_where_listed(kernel: str, code: list[Instruction]) -> None:
    """Releases of system scope are at the places of RELEASES, once each; and in fail(), which runs once."""
    fences = [i for i in code if _FENCE.fullmatch(i.name) and not i.is_from("fence_acquire_sys")]
    found = Counter(_fence_place(fence) for fence in fences if not fence.is_from("fail"))
    assert found == RELEASES[kernel], kernel


def acquires_wait_for_no_writes(kernel: str, code: list[Instruction]) -> None:
    """What is behind a wait is no release as well. For targets with fences of one side: from sm_90 on."""
    assert not [i for i in code if _FENCE.fullmatch(i.name) and i.is_from("fence_acquire_sys")], kernel


def _fence_place(fence: Instruction) -> str:
    names = [place.function for place in fence.places]
    if "submit" in names:
        return f"submit in {names[names.index('submit') + 1]}"
    listed = {place for places in RELEASES.values() for place in places}
    return next((name for name in names if name in listed), " in ".join(names))
