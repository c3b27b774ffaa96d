"""Traces of a real world: who did what when, on one timeline."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from process_world import ProcessWorld, Rank
from thread_world import ThreadBootstrap, outcomes_of_ranks, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig
from vllm_efa_ep.cli import main
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.trace.merge import NETWORK_TRACK, merge

HALVES = ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"]
SIZE, ROUNDS = 4, 6
CONFIG = AllToAllConfig(hidden_size=512, num_experts=8, top_k=2, max_tokens_per_rank=16)
# Rounding of nanoseconds to a float of microseconds.
TICK_US = 1e-2
Event = dict[str, Any]


def run_rounds(all_to_all: AllToAll) -> int:
    """Run some rounds; return the number of writes."""
    random = torch.Generator().manual_seed(all_to_all.rank)
    for _ in range(ROUNDS):
        x = torch.randn(16, 512, generator=random).bfloat16()
        ids = torch.randint(8, (16, 2), generator=random)
        got, handle = all_to_all.dispatch(x, ids, torch.ones(16, 2))
        all_to_all.combine(torch.zeros_like(got.x), handle)
    all_to_all.drain()
    return all_to_all.stats().writes


def traced_body(rank: Rank, directory: str) -> int:
    """Run rounds in a process of its own."""
    # 4 KiB chunks: several writes per pair and operation.
    settings = settings_of(2, trace=directory, chunk_bytes=4096)
    with AllToAll(CONFIG, rank.bootstrap, settings) as all_to_all:
        return run_rounds(all_to_all)


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The merged trace of two nodes of two processes, and how many writes each rank counted."""
    directory = tmp_path_factory.mktemp("trace")
    with ProcessWorld(SIZE, traced_body, str(directory)) as world:
        writes = [world.ended(rank).value for rank in range(SIZE)]
    output = directory / "timeline.json"
    assert main(["trace", "merge", str(directory), "-o", str(output)]) == 0
    return {**json.loads(output.read_text()), "writes": writes}


def chosen(timeline: dict[str, Any], category: str) -> dict[int, list[Event]]:
    """Return the events of a category by rank, in order of time."""
    found: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(timeline["traceEvents"], key=lambda event: event.get("ts", 0)):
        if event.get("cat") == category:
            found[event["pid"]].append(event)
    return found


def test_every_rank_has_its_tracks(timeline: dict[str, Any]) -> None:
    """Named, one per channel and one for the network, in the order of ranks."""
    names = {
        (event["pid"], event["tid"], event["name"]): event["args"]
        for event in timeline["traceEvents"]
        if event["ph"] == "M"
    }
    for rank in range(SIZE):
        assert names[rank, 0, "process_name"]["name"].startswith(f"rank {rank} ")
        assert names[rank, 0, "thread_name"] == {"name": "channel 0"}
        assert names[rank, NETWORK_TRACK, "thread_name"] == {"name": "network"}
        assert names[rank, 0, "process_sort_index"] == {"sort_index": rank}


def test_halves_follow_each_other_with_their_waits_inside(timeline: dict[str, Any]) -> None:
    """Four per round, in order, without overlap; a wait lies in one half and names a rank it may wait for."""
    waits = chosen(timeline, "wait")
    for rank, halves in chosen(timeline, "half").items():
        # dispatch_recv is timed in two pieces: the wait, and the packing of the rows.
        once = [half for i, half in enumerate(halves) if i == 0 or half["name"] != halves[i - 1]["name"]]
        assert [half["name"] for half in once] == HALVES * ROUNDS
        assert [half["args"]["round"] for half in once] == [1 + i // 4 for i in range(4 * ROUNDS)]
        for before, after in pairwise(halves):
            assert before["ts"] + before["dur"] <= after["ts"] + TICK_US
        for wait in waits[rank]:
            inside = [
                half
                for half in halves
                if half["ts"] - TICK_US <= wait["ts"]
                and wait["ts"] + wait["dur"] <= half["ts"] + half["dur"] + TICK_US
            ]
            assert len(inside) == 1
            assert inside[0]["args"]["round"] == wait["args"]["round"]
            assert wait["args"]["peer"] != rank


def test_a_write_lies_between_the_halves_that_caused_it(timeline: dict[str, Any]) -> None:
    """Posted after its operation began, complete before the half that waits for its completion ended."""
    begun = {
        event["id"]: event
        for events in chosen(timeline, "write").values()
        for event in events
        if event["ph"] == "b"
    }
    ended = {
        event["id"]: event
        for events in chosen(timeline, "write").values()
        for event in events
        if event["ph"] == "e"
    }
    assert begun.keys() == ended.keys()
    halves = {
        (rank, half["name"], half["args"]["round"]): half
        for rank, events in chosen(timeline, "half").items()
        for half in events  # the later piece of dispatch_recv
    }
    for identity, begin in begun.items():
        rank, number = begin["pid"], begin["args"]["round"]
        operation = begin["name"].split()[0]
        cause = halves[rank, f"{operation}_send", number]
        assert begin["ts"] >= cause["ts"] - TICK_US
        # A dispatch write's rows may be overwritten after combine_recv, a combine write's after the next
        # dispatch_recv; the last round's are complete when the world closes.
        waiting = (
            halves[rank, "combine_recv", number]
            if operation == "dispatch"
            else halves.get((rank, "dispatch_recv", number + 1))
        )
        if waiting is not None:
            assert ended[identity]["ts"] <= waiting["ts"] + waiting["dur"] + TICK_US


def test_every_write_is_there_and_arrives(timeline: dict[str, Any]) -> None:
    """As many as the counters say; each has one arrival at its peer, later, and one arrow."""
    writes, arrivals = chosen(timeline, "write"), chosen(timeline, "arrival")

    def key(source: int, target: int, event: Event) -> tuple[Any, ...]:
        arguments = event["args"]
        return source, target, event["name"].split()[0], arguments["round"], arguments["chunk"]

    sent = {
        key(rank, event["args"]["peer"], event): event["ts"]
        for rank, events in writes.items()
        for event in events
        if event["ph"] == "b"
    }
    arrived = {
        key(event["args"]["peer"], rank, event): event["ts"]
        for rank, events in arrivals.items()
        for event in events
    }
    assert sent.keys() == arrived.keys()
    assert all(arrived[each] >= sent[each] - TICK_US for each in sent)
    assert len(sent) == sum(timeline["writes"])
    assert max(chunk for *_, chunk in sent) > 0, "chunks were to be cut"
    arrows = [event for events in chosen(timeline, "arrow").values() for event in events]
    assert len(arrows) == 2 * len(sent)
    assert set(timeline["otherData"]["dropped_spans"].values()) == {0}


def test_a_trace_keeps_the_newest_spans(tmp_path: Path) -> None:
    """As many as the setting says, and it says how many are gone."""
    run_world(CONFIG, 2, settings_of(1, trace=str(tmp_path), trace_spans=5), run_rounds)
    for path in tmp_path.glob("rank*.json"):
        content = json.loads(path.read_text())
        assert len(content["spans"]) == 10  # of the channel, and of the network
        assert content["dropped"] > 0
        assert {span["round"] for span in content["spans"]} <= {ROUNDS - 1, ROUNDS}


def test_clocks_of_hosts_are_brought_together(tmp_path: Path) -> None:
    """Two hosts, 7 ms apart, 40 and 60 us of transit: the same instant lands within half the difference."""
    skew_ns = 7_000_000
    for rank, host, clock in ((0, 0, 0), (1, 0, 0), (2, 2, skew_ns), (3, 2, skew_ns)):
        delays = [
            (skew_ns if host else 0) - (skew_ns if other >= 2 else 0) + (60_000 if host else 40_000)
            for other in range(SIZE)
        ]
        instant = {
            "kind": "arrival",
            "what": "dispatch",
            "channel": 0,
            "round": 1,
            "peer": 0,
            "chunk": 0,
            "bytes": 0,
            "begin_ns": 10**9 + clock,
            "end_ns": 10**9 + clock,
        }
        content = {"schema": "vllm-efa-ep trace 1", "rank": rank, "host": host, "generation": 0}
        content |= {"least_delays_ns": delays, "dropped": 0, "spans": [instant]}
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(content))
    merged = merge(tmp_path)
    times = [event["ts"] for event in merged["traceEvents"] if event.get("cat") == "arrival"]
    assert max(times) - min(times) <= 10.0 + TICK_US
    assert merged["otherData"]["clock_errors_us"]["2"] == 50.0
    assert merged["otherData"]["clock_offsets_us"]["2"] == pytest.approx(7000, abs=10.1)


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With its path: the rounds are complete, and everything is freed. In a ``with`` the error stays."""
    directory = tmp_path / "trace"

    def body(all_to_all: AllToAll) -> None:
        run_rounds(all_to_all)
        directory.rmdir()
        raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        run_world(CONFIG, 1, settings_of(1, trace=str(directory)), body)
    (warning,) = [each.message for each in caplog.records if each.name == "vllm_efa_ep.generation"]
    assert f"{directory}/rank0." in warning
    assert "No such file or directory" in warning
    assert "efa_ep_arena" not in Path("/proc/self/maps").read_text()


def test_a_directory_that_cannot_be_created_is_refused_at_the_start(tmp_path: Path) -> None:
    """On all ranks, of which one may have another directory."""
    (tmp_path / "file").touch()

    def body(bootstrap: ThreadBootstrap) -> None:
        directory = tmp_path / ("file" if bootstrap.rank == 1 else "directory")
        AllToAll(CONFIG, bootstrap, settings_of(1, trace=str(directory / "trace")))

    for outcome in outcomes_of_ranks(2, body):
        assert isinstance(outcome.error, ConfigurationError)
        assert f"EFA_EP_TRACE is '{tmp_path}/file/trace', which cannot be created" in str(outcome.error)


def test_the_command_says_in_one_line_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank's file that was cut off on its way, something else under that name, no place for the output."""
    run_world(CONFIG, 1, settings_of(1, trace=str(tmp_path)), run_rounds)
    assert main(["trace", "merge", str(tmp_path), "-o", str(tmp_path / "missing" / "trace.json")]) == 2
    assert "name another file with -o" in capsys.readouterr().err
    (path,) = tmp_path.glob("rank*.json")
    for text, words in ((path.read_text()[:-9], "cannot be read"), ("[]", "is not a trace of this version")):
        path.write_text(text)
        assert main(["trace", "merge", str(tmp_path)]) == 2
        assert f"{path} {words}" in capsys.readouterr().err


def test_nothing_to_merge_is_an_error(tmp_path: Path) -> None:
    """With the remedy; and files of others are refused by name."""
    with pytest.raises(ConfigurationError, match="EFA_EP_TRACE="):
        merge(tmp_path)
    (tmp_path / "rank0.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"rank0\.json"):
        merge(tmp_path)
