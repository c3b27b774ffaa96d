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
    "reduce_rows": ("sum_rows",),
    "sum_rail": ("sum_rows",),
    "gather_tokens": ("sum_rows",),
}
_GLOBAL = re.compile(r"(LDG?|STG?|ATOM\w*|RED\w*)(\..*)?")
_LOAD = re.compile(r"LDG?\..*\.128(\..*)?")
_STORE = re.compile(r"STG?\..*\.128(\..*)?")
_SCALE = re.compile(r"\bscales\)?\[")

# System-scope fences make an SM wait for all its writes, so each is listed: one in submit(), which hands over
# a chunk; one where the flag of a (pair, half) is raised; and the acquires behind waits. How often these
# places are passed is counted by Releases.AreOnePerChunkAndPair in tests/simt.
FENCES = {
    "route_tokens": Counter[str](),
    "stage_tokens": Counter({"submit in submit_empty": 1, "submit in row_is_ready": 1, "publish_lists": 1}),
    "forward_slots": Counter({"forward_slot": 1}),
    "take_rows": Counter({"wait_until_sent": 1, "wait_for_round": 1}),
    "pack_rows": Counter[str](),
    "reduce_rows": Counter({"submit in submit_empty": 1, "submit in row_is_ready": 1, "publish_results": 1}),
    "sum_rail": Counter({"submit in submit_empty": 1, "submit in row_is_ready": 1, "wait_for_round": 1}),
    "gather_tokens": Counter({"wait_for_round": 2, "wait_until_sent": 1}),
}
_FENCE = re.compile(r"MEMBAR\..*SYS")


def no_local_memory(kernel: str, code: list[Instruction]) -> None:
    """Nothing is spilled, and no array lies in local memory."""
    assert not [i.name for i in code if re.fullmatch(r"(LDL|STL)(\..*)?", i.name)], kernel


def sixteen_bytes_at_a_time(kernel: str, code: list[Instruction]) -> None:
    """The loops over a row's payload touch global memory 16 bytes at a time, and in no other way."""
    for function in PAYLOAD.get(kernel, ()):
        accesses = [i for i in code if _GLOBAL.fullmatch(i.name) and i.is_from(function)]
        # One scale per 128 values is no part of the payload.
        payload = [i for i in accesses if not any(_SCALE.search(place.text) for place in i.places)]
        narrow = {i.name for i in payload if not (_LOAD.fullmatch(i.name) or _STORE.fullmatch(i.name))}
        assert not narrow, f"{kernel}, {function}: {narrow}"
        if not payload and kernel == "stage_tokens":
            continue  # of the other Quantisation
        assert any(_LOAD.fullmatch(i.name) for i in payload), f"{kernel}, {function}"
        assert any(_STORE.fullmatch(i.name) for i in payload), f"{kernel}, {function}"


def fences_where_listed(kernel: str, code: list[Instruction]) -> None:
    """Fences of system scope are at the places of FENCES, once each; and in fail(), which runs once."""
    found = Counter(_fence_place(i) for i in code if _FENCE.fullmatch(i.name) and not i.is_from("fail"))
    assert found == FENCES[kernel], kernel


def _fence_place(fence: Instruction) -> str:
    names = [place.function for place in fence.places]
    if "submit" in names:
        return f"submit in {names[names.index('submit') + 1]}"
    listed = {place for places in FENCES.values() for place in places}
    return next((name for name in names if name in listed), " in ".join(names))
