"""Metrics from a rank's counters to the text that Prometheus reads, and the pages that name them."""

import dataclasses
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from thread_world import DEADLINE_S, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, _core
from vllm_efa_ep.cli import main
from vllm_efa_ep.metrics.collector import RankCollector
from vllm_efa_ep.metrics.registry import METRICS, NIC_METRICS, RANK_METRICS, metrics_markdown
from vllm_efa_ep.metrics.snapshot import SnapshotWriter
from vllm_efa_ep.stats import Stats

ROUNDS = 3
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Return every sample of an exposition by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(directory: Path, sysfs: Path) -> Samples:
    """Return what /metrics would say."""
    registry = CollectorRegistry()
    registry.register(RankCollector(directory, sysfs))
    return parsed(generate_latest(registry).decode())


def run_rounds(directory: Path) -> list[Stats]:
    """Run a world whose ranks write snapshots; return their counters."""
    config = AllToAllConfig(hidden_size=64, num_experts=8, top_k=2, max_tokens_per_rank=8)

    def body(all_to_all: AllToAll) -> Stats:
        snapshots = SnapshotWriter(str(directory), all_to_all.rank, lambda: [all_to_all])
        for _ in range(ROUNDS):
            x = torch.ones(5, 64, dtype=torch.bfloat16)
            ids = torch.arange(10).view(5, 2) % 8
            got, handle = all_to_all.dispatch(x, ids, torch.ones(5, 2))
            all_to_all.combine(got.x, handle)
        all_to_all.drain()
        stats = all_to_all.stats()
        snapshots.close()
        return stats

    return run_world(config, 4, settings_of(2), body)


def test_a_scrape_shows_what_the_ranks_counted(tmp_path: Path) -> None:
    """Counter by counter and bucket by bucket, for every rank of a world of two nodes."""
    all_stats = run_rounds(tmp_path)
    samples = scrape(tmp_path, tmp_path / "no NICs")
    bounds = [f"{bound:.9g}" for bound in _core.duration_bounds()]
    for rank, stats in enumerate(all_stats):
        labels = {"rank": str(rank), "layout": "per_token"}

        def value(name: str, labels: dict[str, str] = labels, **more: str) -> float:
            return samples[name, frozenset({**labels, **more}.items())]

        assert value("efa_ep_rounds_total") == ROUNDS
        assert value("efa_ep_tokens_total") == 5 * ROUNDS
        assert value("efa_ep_writes_total") == stats.writes > 0
        assert value("efa_ep_written_bytes_total") == stats.bytes_written > 0
        assert value("efa_ep_arrivals_total") == stats.immediates > 0
        for name, seconds, buckets in (
            ("efa_ep_half_seconds", stats.half_seconds, stats.half_buckets),
            ("efa_ep_wait_seconds", stats.wait_seconds, stats.wait_buckets),
        ):
            for half, counts in buckets.items():
                assert value(f"{name}_sum", half=half) == pytest.approx(seconds[half])
                assert value(f"{name}_count", half=half) == ROUNDS
                for place, bound in enumerate(bounds):
                    expected = sum(counts[: place + 1])
                    found = [
                        count
                        for (sample, found_labels), count in samples.items()
                        if sample == f"{name}_bucket"
                        and dict(found_labels).items() >= {**labels, "half": half}.items()
                        and float(dict(found_labels)["le"]) == float(bound)
                    ]
                    assert found == [expected]
        slowest = value("efa_ep_slowest_peer")
        assert slowest == (-1 if stats.slowest_peer is None else stats.slowest_peer)
        assert any(
            name == "efa_ep_rank_info" and ("provider", stats.provider) in found for name, found in samples
        )


def test_instances_of_one_layout_are_added_up(tmp_path: Path) -> None:
    """Models with two kinds of MoE layers have two instances; equal labels twice would break the scrape."""
    (stats, *_) = run_rounds(tmp_path / "world")
    first = dataclasses.replace(stats, waited_for_seconds=[0.0, 3.0, 0.0, 2.0])
    second = dataclasses.replace(stats, waited_for_seconds=[0.0, 0.0, 0.0, 2.0])
    idle = dataclasses.replace(
        stats, waited_for_seconds=[0.0] * 4, wait_seconds=dict.fromkeys(stats.wait_seconds, 0.0)
    )
    layouts = [("per_token", first), ("per_token", idle), ("per_token", second), ("per_expert", second)]
    instances: list[Any] = [
        SimpleNamespace(config=SimpleNamespace(layout=layout), stats=lambda each=each: each)
        for layout, each in layouts
    ]
    SnapshotWriter(str(tmp_path), 7, lambda: instances).close()
    samples = scrape(tmp_path, tmp_path)
    both = frozenset({("rank", "7"), ("layout", "per_token")})
    assert samples["efa_ep_rounds_total", both] == 3 * ROUNDS
    assert samples["efa_ep_half_seconds_count", both | {("half", "combine_recv")}] == 3 * ROUNDS
    assert samples["efa_ep_slowest_peer", both] == 3
    assert samples["efa_ep_slowest_peer_wait_seconds", both] == 4.0
    other = frozenset({("rank", "7"), ("layout", "per_expert")})
    assert samples["efa_ep_rounds_total", other] == ROUNDS


def test_stages_of_a_pipeline_are_added_up(tmp_path: Path) -> None:
    """Each stage has a rank 7 of its own, in another process: neither may overwrite the other's file."""
    (stats, *_) = run_rounds(tmp_path / "world")
    instances: list[Any] = [SimpleNamespace(config=SimpleNamespace(layout="per_token"), stats=lambda: stats)]
    for stage in range(3):
        SnapshotWriter(str(tmp_path), 7, lambda: instances, stage).close()
    assert len(list(tmp_path.glob("rank*.json"))) == 3
    labels = frozenset({("rank", "7"), ("layout", "per_token")})
    samples = scrape(tmp_path, tmp_path)
    assert samples["efa_ep_rounds_total", labels] == 3 * ROUNDS
    assert samples["efa_ep_half_seconds_count", labels | {("half", "combine_recv")}] == 3 * ROUNDS


def test_a_file_that_is_none_of_ours_costs_no_scrape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """/metrics goes on without it: vLLM's own metrics are on the same page."""
    run_rounds(tmp_path)
    before = scrape(tmp_path, tmp_path)
    (tmp_path / "rank9.json").write_text("{")
    (tmp_path / "rank8.json").symlink_to(tmp_path / "gone")
    assert scrape(tmp_path, tmp_path) == before
    warnings = [each.message for each in caplog.records if each.name == "vllm_efa_ep.metrics.collector"]
    assert all(any(f"rank{rank}.json" in warning for warning in warnings) for rank in (8, 9))


def test_a_failed_rank_keeps_its_last_counters(tmp_path: Path) -> None:
    """An instance that has failed cannot count any more; its file stays readable."""
    run_rounds(tmp_path)
    before = scrape(tmp_path, tmp_path)

    def fail() -> Stats:
        raise ConnectionError

    broken: list[Any] = [SimpleNamespace(config=SimpleNamespace(layout="per_token"), stats=fail)]
    with pytest.raises(ConnectionError):  # an error that is not ours is not hidden
        SnapshotWriter(str(tmp_path), 0, lambda: broken).close()
    assert scrape(tmp_path, tmp_path) == before


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rank works without its metrics: one warning with path and reason, and the thread goes on."""
    (stats, *_) = run_rounds(tmp_path / "world")
    removed, looked = threading.Event(), threading.Semaphore(0)

    def look() -> list[Any]:
        assert removed.wait(DEADLINE_S)
        looked.release()
        return [SimpleNamespace(config=SimpleNamespace(layout="per_token"), stats=lambda: stats)]

    directory = tmp_path / "snapshots"
    snapshots = SnapshotWriter(str(directory), 3, look)
    directory.rmdir()
    removed.set()
    for _ in range(3):
        assert looked.acquire(timeout=DEADLINE_S)
    snapshots.close()
    (warning,) = [record for record in caplog.records if record.name == "vllm_efa_ep.metrics.snapshot"]
    assert str(directory / "rank3.json") in warning.message
    assert "No such file or directory" in warning.message


def make_device(root: Path, name: str, driver: str, counters: dict[str, int]) -> None:
    """Lay out a device as sysfs does."""
    directory = root / name / "ports" / "1" / "hw_counters"
    directory.mkdir(parents=True)
    for counter, value in counters.items():
        (directory / counter).write_text(f"{value}\n")
    (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
    (root / name / "device").mkdir()
    (root / name / "device" / "driver").symlink_to(root / "drivers" / driver)


def test_hardware_counters_of_efa_devices_only(tmp_path: Path) -> None:
    """Those that can be read: one that the driver lacks or refuses is no error. Other NICs are not ours."""
    every = {metric.source: 100 + place for place, metric in enumerate(NIC_METRICS)}
    make_device(tmp_path, "rdmap0s6", "efa", every)
    make_device(tmp_path, "rdmap1s6", "efa", {"retrans_pkts": 5})
    make_device(tmp_path, "mlx5_0", "mlx5_core", every)
    unreadable = tmp_path / "rdmap1s6" / "ports" / "1" / "hw_counters" / "rx_drops"
    unreadable.mkdir()  # reading it is an error, for root too
    samples = scrape(tmp_path / "no snapshots", tmp_path)
    first = frozenset({("device", "rdmap0s6"), ("port", "1")})
    for place, metric in enumerate(NIC_METRICS):
        assert samples[f"{metric.name}_total", first] == 100 + place
    second = frozenset({("device", "rdmap1s6"), ("port", "1")})
    assert {name for name, labels in samples if labels == second} == {
        "efa_ep_nic_retransmitted_packets_total"
    }
    assert not any(("device", "mlx5_0") in labels for _, labels in samples)


def test_every_metric_has_a_source() -> None:
    """A misspelt source would leave a metric empty for ever."""
    derived = {"half", "wait", "info", "slowest_peer", "slowest_peer_wait_seconds"}
    fields = {field.name for field in dataclasses.fields(Stats)} | derived
    assert {metric.source for metric in RANK_METRICS} <= fields
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_documentation_is_generated() -> None:
    """``docs/metrics.md`` has the table that ``vllm-efa-ep metrics --markdown`` prints."""
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert metrics_markdown() in page.read_text()


def test_the_exporter_for_nodes_without_an_api_server(tmp_path: Path) -> None:
    """It serves the same text, and ends on SIGTERM."""
    run_rounds(tmp_path)
    command = [sys.executable, "-c", "import sys; from vllm_efa_ep.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "metrics", "--port", "0", "--address", "127.0.0.1"],
        env={"EFA_EP_STATS_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(address, timeout=DEADLINE_S) as answer:
            samples = parsed(answer.read().decode())
        rank_0 = frozenset({("rank", "0"), ("layout", "per_token")})
        assert samples["efa_ep_rounds_total", rank_0] == ROUNDS
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_the_exporter_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, like every error of the command."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["metrics", "--port", "0"]) == 2
    assert "vllm-efa-ep[metrics]" in capsys.readouterr().err


def test_a_port_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Numbers end at 65535."""
    monkeypatch.setenv("EFA_EP_STATS_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)  # of this process
    assert main(["metrics", "--port", "70000"]) == 2
    assert "cannot serve on 0.0.0.0:70000" in capsys.readouterr().err
