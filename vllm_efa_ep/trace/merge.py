"""One timeline of all ranks, in the Trace Event Format that Perfetto and chrome://tracing read.

Each rank is a process. Halves are slices on a track per channel, with waits inside them; writes are
asynchronous slices from posting to completion; arrivals are instants; an arrow leads from a write to its
arrival.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_efa_ep.trace.clock import Offset, offset_between
from vllm_efa_ep.trace.files import read

NETWORK_TRACK = 100
Event = dict[str, Any]
# What a write and its arrival have in common.
_KEY = ("what", "channel", "round", "chunk")


def merge(directory: Path) -> dict[str, Any]:
    """Return the timeline of the files that ranks left in ``directory``.

    Raises:
        ConfigurationError: There are none, or one is something else.

    """
    files = list(read(directory))
    offsets = _offsets(files)
    begin = min(
        (span["begin_ns"] - offsets[file["host"]].ns for file in files for span in file["spans"]), default=0
    )
    events: list[Event] = []
    arrows: dict[tuple[Any, ...], dict[str, Event]] = {}
    for file in files:
        events.extend(_names(file))
        start = begin + offsets[file["host"]].ns
        for number, span in enumerate(file["spans"]):
            events.extend(_events(file, span, start, f"{file['rank']}.{file['generation']}.{number}"))
            _note_end_of_arrow(arrows, file, span, start)
    for number, ends in enumerate(arrows.values()):
        if len(ends) == 2:
            events += [{**ends["s"], "id": number}, {**ends["f"], "id": number}]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "clock_offsets_us": {str(host): offset.ns / 1e3 for host, offset in offsets.items()},
            "clock_errors_us": {str(host): offset.error_ns / 1e3 for host, offset in offsets.items()},
            "dropped_spans": {str(file["rank"]): file["dropped"] for file in files},
        },
    }


def _offsets(files: Sequence[dict[str, Any]]) -> dict[int, Offset]:
    """Return each host's offset against the first; ranks of one host share a clock."""
    ranks: dict[int, list[int]] = {}
    for file in files:
        ranks.setdefault(file["host"], []).append(file["rank"])
    delays = {file["rank"]: file["least_delays_ns"] for file in files}
    reference = min(ranks)
    return {
        host: Offset(0, 0) if host == reference else offset_between(ranks[reference], members, delays)
        for host, members in sorted(ranks.items())
    }


def _names(file: dict[str, Any]) -> Iterator[Event]:
    rank = file["rank"]
    yield _meta(rank, 0, "process_name", f"rank {rank} (host {file['host']})")
    yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}}
    for channel in sorted({span["channel"] for span in file["spans"]}):
        yield _meta(rank, channel, "thread_name", f"channel {channel}")
    yield _meta(rank, NETWORK_TRACK, "thread_name", "network")


def _meta(rank: int, track: int, name: str, value: str) -> Event:
    return {"ph": "M", "pid": rank, "tid": track, "name": name, "args": {"name": value}}


def _events(file: dict[str, Any], span: dict[str, Any], start: float, identity: str) -> Iterator[Event]:
    rank, kind, peer = file["rank"], span["kind"], span["peer"]
    arguments = {name: span[name] for name in ("round", "channel", "peer", "chunk", "bytes")}
    arguments["generation"] = file["generation"]
    begin, end = (span["begin_ns"] - start) / 1e3, (span["end_ns"] - start) / 1e3
    common = {"pid": rank, "cat": kind, "args": arguments}
    if kind in ("half", "wait"):
        name = (
            span["what"]
            if kind == "half"
            else f"wait for {'completions' if peer is None else f'rank {peer}'}"
        )
        yield {**common, "ph": "X", "tid": span["channel"], "name": name, "ts": begin, "dur": end - begin}
        return
    name = f"{span['what']} {'to' if kind == 'write' else 'from'} rank {peer}"
    common |= {"tid": NETWORK_TRACK, "name": name}
    if kind == "arrival":
        yield {**common, "ph": "i", "s": "t", "ts": begin}
        return
    yield {**common, "ph": "b", "id": identity, "ts": begin}
    if span["end_ns"]:
        yield {**common, "ph": "e", "id": identity, "ts": end}


def _note_end_of_arrow(
    arrows: dict[tuple[Any, ...], dict[str, Event]], file: dict[str, Any], span: dict[str, Any], start: float
) -> None:
    if span["kind"] not in ("write", "arrival"):
        return
    phase = "s" if span["kind"] == "write" else "f"
    ends = (file["rank"], span["peer"]) if phase == "s" else (span["peer"], file["rank"])
    key = (file["generation"], *ends, *(span[name] for name in _KEY))
    arrows.setdefault(key, {})[phase] = {
        "ph": phase,
        "pid": file["rank"],
        "tid": span["channel"],  # arrows join slices: the half that posted, and the half that receives
        "name": span["what"],
        "cat": "arrow",
        "ts": (span["begin_ns"] - start) / 1e3,
        **({"bp": "e"} if phase == "f" else {}),
    }
