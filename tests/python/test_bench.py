"""``vllm-efa-ep bench``: what it counts as time, whom it believes, and in which worlds it runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bench_documents import document
from process_world import Rank, run_processes
from thread_world import DEADLINE_S, run_ranks

from vllm_efa_ep.bench import results
from vllm_efa_ep.bench.compare import caveats, compare
from vllm_efa_ep.bench.contestants.allgather import NcclAllGather
from vllm_efa_ep.bench.contestants.alltoall import NcclAllToAll
from vllm_efa_ep.bench.contestants.contestant import Workplace
from vllm_efa_ep.bench.launch import RanksFailedError, run_local
from vllm_efa_ep.bench.measure import Effort, Timings, compete
from vllm_efa_ep.bench.member import measure_with
from vllm_efa_ep.bench.plan import OPPONENTS, Plan
from vllm_efa_ep.bench.plots import LABELS
from vllm_efa_ep.bench.problem import Cell, Problem, WrongResultError
from vllm_efa_ep.bench.report import report
from vllm_efa_ep.bench.session import run_worlds
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.cli import main
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError

PLAN = Plan((256,), ("bf16", "fp8"), (1, 7), 16, 4, (), Effort(1, 3, 3, 0.0), 1, 1)
CELL = Cell(4, 2, 256, "bf16", 5, experts=16, top_k=4)


def test_a_round_is_the_slowest_ranks_and_an_operation_everyones() -> None:
    """Two ranks, two iterations, numbers small enough to add by hand."""
    nanoseconds = np.array([[[1, 2, 3, 4], [10, 20, 30, 40]], [[5, 5, 5, 5], [1, 1, 1, 1]]]) * 1000
    timings = Timings(("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"), nanoseconds, {})
    assert timings.rounds_us().tolist() == [20, 100]
    assert timings.operation_us("dispatch").tolist() == [[3, 30], [10, 2]]
    assert timings.operation_us("combine").tolist() == [[7, 70], [10, 2]]
    assert timings.step_us("combine_send").tolist() == [[3, 30], [5, 1]]


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_the_floor_is_one_row_per_token_and_remote_node(ranks_per_node: int) -> None:
    """Counted pair by pair from the routes of one rank."""
    cell = replace(CELL, ranks_per_node=ranks_per_node)
    problem = Problem(cell, rank=1, seed=3)
    own_node = 1 // ranks_per_node
    pairs = 0
    for ids in problem.inputs.ids.tolist():
        pairs += len({expert // 4 // ranks_per_node for expert in ids} - {own_node})
    assert problem.wire_floor_bytes() == pairs * 256 * (2 + 2)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_wrong_results_are_found(dtype: str) -> None:
    """The oracle accepts what was sent, and refuses one wrong byte or one result beyond rounding."""
    problem = Problem(replace(CELL, dtype=dtype), rank=0, seed=1)
    sources = [Problem(problem.cell, rank, seed=1).inputs for rank in range(4)]
    x = torch.cat([source.x.view(torch.uint8) for source in sources])
    scales = (
        None if sources[0].scales is None else torch.cat([s.scales for s in sources if s.scales is not None])
    )
    ids, weights = torch.cat([s.ids for s in sources]), torch.cat([s.weights for s in sources])

    def check() -> None:
        rows = x.view(problem.cell.format.dispatch)
        problem.check_dispatch("x", rows, scales, ids, weights, of_all=True)

    check()
    x[-1, -1] ^= 1
    with pytest.raises(WrongResultError, match="x from rank 3"):
        check()
    out = (problem.inputs.values() * problem.inputs.weights.sum(1, keepdim=True)).to(problem.out.dtype)
    problem.check_out("x", out)
    out[2, 3] *= 1.5
    with pytest.raises(WrongResultError, match="1 of 1280"):
        problem.check_out("x", out)


def test_a_plan_survives_the_way_to_its_ranks() -> None:
    """Equal on both sides of the command line."""
    assert Plan.from_json(PLAN.to_json()) == PLAN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"against": ("nccl",)}, "gloo-agrs"),
        ({"dtypes": ("int4",)}, "fp8"),
        ({"device": "tpu"}, "cuda"),
        ({"against": ("nccl-a2a",)}, "nccl-a2a moves rows in GPU memory only, .* give --device cuda"),
        ({"against": ("gloo-agrs",), "device": "cuda"}, "gloo-agrs moves rows in CPU memory only"),
        ({"effort": Effort(0, 0, 0, 0.0)}, "at least one"),
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, object], words: str) -> None:
    """Before anything is started; the error says what would do."""
    with pytest.raises(ConfigurationError, match=words):
        replace(PLAN, **change).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--against", "ordinary-tensors,mpi"], {}, "mpi cannot be measured with --ray"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "leave out --ray"),
    ],
)
def test_what_ranks_on_ray_cannot_do_is_refused(
    options: list[str],
    environment: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before a cluster is looked for."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "--ray", *options]) == 2
    assert words in capsys.readouterr().err


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray is an extra; this machine alone must not pass for a cluster."""
    monkeypatch.setitem(sys.modules, "ray", None)
    for module in ("bench.launch_on_ray", "bootstrap.ray_hosts", "bootstrap.ray"):
        monkeypatch.delitem(sys.modules, f"vllm_efa_ep.{module}", raising=False)
    assert main(["bench", "--ray"]) == 2
    assert "vllm-efa-ep[ray]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": 256}, "288 for 24"),
        ({"top_k": 17}, "--top-k 17 of --experts 16"),
        ({"hidden": (256, 100)}, "hidden size that is a multiple of 8"),
    ],
)
def test_a_cell_that_cannot_be_measured_is_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    """In whatever world it is, before the first one is started."""

    def launch(_plan: Plan, world: int) -> list[results.CellResult]:
        raise AssertionError(f"{world} ranks were started")

    plan = replace(PLAN, dtypes=("bf16",), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=words):
        run_worlds(plan, (2, 24), 1, tmp_path, launch)
    assert list(tmp_path.iterdir()) == []


def test_results_before_an_error_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A world may take hours; the next one's error must not cost them."""
    (found,) = document({CELL: rounds(1, 100, 1)})["results"]

    def launch(_plan: Plan, world: int) -> Iterator[results.CellResult]:
        yield found
        if world == 4:
            raise RanksFailedError("process 1 ended")

    with pytest.raises(RanksFailedError):
        run_worlds(PLAN, (2, 4, 8), 1, tmp_path, launch)
    assert len(results.read(tmp_path / "bench.json")["results"]) == 2
    assert "has the results so far" in " ".join(capsys.readouterr().err.split())


def test_a_run_on_this_machine(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks as two nodes: every dtype and token count is measured, checked and counted."""
    monkeypatch.delenv("EFA_EP_TOKEN_FILE", raising=False)
    found = list(run_local(replace(PLAN, against=("gloo-agrs", "gloo-a2a", "ordinary-tensors")), 2))
    assert [(each["cell"]["dtype"], each["cell"]["tokens"]) for each in found] == [
        ("bf16", 1),
        ("bf16", 7),
        ("fp8", 1),
        ("fp8", 7),
    ]
    for each in found:
        contestants = each["contestants"]
        assert list(contestants) == ["ours", "gloo_allgather", "gloo_alltoall", "ours_elsewhere"]
        ours = contestants["ours"]
        assert len(ours["rounds_us"]) == 3
        assert ours["per_round"]["writes"] == 2  # one each way to the only other node
        assert ours["per_round"]["bytes_written"] >= each["wire_floor_bytes"] > 0
        assert ours["environment"]["provider"]
        assert each["barrier"] == "shared memory"
    assert "no secret" not in capfd.readouterr().err  # the launcher made one


def test_a_run_under_mpirun() -> None:
    """MPI is measured between ranks that mpirun started."""
    plan = replace(PLAN, dtypes=("bf16",), tokens=(2,), against=("mpi",))
    (found,) = run_local(plan, 2)
    assert len(found["contestants"]["mpi_alltoallv"]["rounds_us"]) == 3


def test_a_run_over_any_bootstrap() -> None:
    """Ranks that something else has started and connected, such as Ray."""
    plan = replace(PLAN, tokens=(2,))
    first, second = run_ranks(2, lambda bootstrap: measure_with(bootstrap, plan.to_json()))
    assert [each["cell"]["dtype"] for each in first] == ["bf16", "fp8"]
    assert second == []


def _measure_without_a_group(rank: Rank, plan_json: str) -> list[str]:
    """As Ray's ranks do: connected, but not by torch.distributed."""
    given = rank.bootstrap
    store = dist.distributed_c10d._get_default_store()
    bootstrap = StoreBootstrap(store, given.run, given.rank, given.world_size, DEADLINE_S)
    dist.destroy_process_group()
    found = measure_with(bootstrap, plan_json)
    assert not dist.is_initialized()
    return [name for each in found for name in each["contestants"]]


def test_a_run_over_any_bootstrap_has_contestants_on_gloo() -> None:
    """They get a process group of their own, which is gone afterwards."""
    plan = replace(PLAN, tokens=(2,), dtypes=("bf16",), against=("gloo-agrs", "gloo-a2a"))
    names = ["ours", "gloo_allgather", "gloo_alltoall"]
    assert run_processes(2, _measure_without_a_group, plan.to_json()) == [names, []]


def test_a_machine_with_gpus_measures_the_tensors_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem's tensors are the CPU's, also where ``device="auto"`` would mean a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = replace(PLAN, tokens=(2,), dtypes=("bf16",))
    (found,), _ = run_ranks(2, lambda bootstrap: measure_with(bootstrap, plan.to_json()))
    assert len(found["contestants"]["ours"]["rounds_us"]) == 3


def test_without_a_gpu_nccl_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, before it starts anything, and by a rank that another launcher has started."""
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs; the test is about one that has none")
    assert main(["bench", "--device", "cuda", "--against", "nccl-agrs,nccl-a2a"]) == 2
    assert "needs an NVIDIA GPU" in (refused := capsys.readouterr().err)
    assert "leave out --device and the contestants on NCCL" in refused
    plan = replace(PLAN, device="cuda")
    with pytest.raises(ConfigurationError, match="needs an NVIDIA GPU"):
        run_ranks(2, lambda bootstrap: measure_with(bootstrap, plan.to_json()))


def _compete_on_nccl(rank: Rank) -> list[str]:
    """Check and time the contestants on NCCL, for which gloo has to do here."""
    bootstrap = rank.bootstrap
    workplace = Workplace(bootstrap, Settings(), {"nccl": dist.group.WORLD})
    problem = Problem(replace(CELL, world=2, ranks_per_node=1), bootstrap.rank, seed=1)
    kinds = (NcclAllGather, NcclAllToAll)
    timings, _ = compete(problem, kinds, workplace, lambda: bootstrap.all_gather(b""), PLAN.effort)
    return list(timings)


def test_contestants_on_nccl_are_right_on_any_backend() -> None:
    """They have no code of their own, and take the process group that is named after them."""
    assert run_processes(2, _compete_on_nccl) == [["nccl_allgather", "nccl_alltoall"]] * 2
    workplace = Workplace(bootstrap=None, settings=Settings(), groups={"gloo": None})  # type: ignore[arg-type, dict-item]
    for kind in (NcclAllGather, NcclAllToAll):
        with pytest.raises(ConfigurationError, match="the contestants on nccl need a torch process group"):
            kind(Problem(CELL, 0, seed=1), workplace)


def test_a_rank_that_fails_fails_the_run() -> None:
    """No half-filled table passes for a result."""
    with pytest.raises(RanksFailedError, match="process 0 ended"):
        list(run_local(replace(PLAN, experts=7), 2))


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the report, and back from the JSON to the same report."""
    flags = ["--tokens", "1,4", "--hidden", "256", "--experts", "16", "--iterations", "3", "--warm-up", "1"]
    assert main(["bench", "--out", str(tmp_path), *flags]) == 0
    assert "ours" in capsys.readouterr().out
    written = results.read(tmp_path / "bench.json")
    assert len(written["results"]) == 2
    assert {"versions", "host", "settings", "git_commit"} <= written["environment"].keys()
    again = tmp_path / "again.html"
    assert main(["bench", "report", str(tmp_path / "bench.json"), str(again)]) == 0
    assert again.read_text() == (tmp_path / "bench.html").read_text()
    assert main(["bench", "compare", *[str(tmp_path / "bench.json")] * 2]) == 0
    shown = capsys.readouterr().out
    assert "no difference shown" in shown
    assert "one process start" in shown


def test_a_world_that_torchrun_started(tmp_path: Path) -> None:
    """Each process is one rank; rank 0 alone writes."""
    program = Path(sys.executable).parent / "vllm-efa-ep"
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    command = [*launcher, "--standalone", "--nproc-per-node", "2", "--no-python"]
    flags = ["--tokens", "3", "--hidden", "256", "--experts", "16", "--iterations", "2", "--warm-up", "1"]
    result = subprocess.run(
        [*command, program, "bench", *flags, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (cell,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert cell["cell"]["world"] == 2


def rounds(seed: int, middle_us: float, starts: int) -> list[np.ndarray]:
    """Return rounds of several starts that scatter by 5 % around starts that scatter by 2 %."""
    random = np.random.default_rng(seed)
    return [random.normal(middle_us * random.normal(1, 0.02), middle_us * 0.05, 100) for _ in range(starts)]


@pytest.mark.parametrize(
    ("after_us", "verdict"), [(100.0, "no difference shown"), (80.0, "faster"), (125.0, "slower")]
)
def test_a_comparison_claims_what_the_spread_allows(after_us: float, verdict: str) -> None:
    """Equal runs show no difference; 20 % between runs that scatter by 2 % are one."""
    found = compare(document({CELL: rounds(1, 100, 8)}), document({CELL: rounds(2, after_us, 8)}))
    assert [each.contestant for each in found] == ["ours", "gloo_alltoall"]
    for each in found:
        assert each.verdict == verdict
        assert each.low < each.ratio < each.high
        assert each.ratio == pytest.approx(after_us / 100, rel=0.04)


def test_a_comparison_of_single_starts_says_so() -> None:
    """Iterations of one process cannot speak for the next process."""
    before, after = document({CELL: rounds(1, 100, 1)}), document({CELL: rounds(2, 100, 1)})
    assert any("--starts" in caveat for caveat in caveats(before, after, compare(before, after)))
    after["environment"] = {**after["environment"], "host": {"cpu": "another", "cores": 8}}
    assert any("differ in cpu" in caveat for caveat in caveats(before, after, compare(before, after)))


def test_a_comparison_names_what_rounds_depend_on() -> None:
    """Files of different devices, barriers or networks are compared, but not without a word."""
    before, after = document({CELL: rounds(1, 100, 4)}), document({CELL: rounds(2, 100, 4)})
    assert list(caveats(before, after, compare(before, after))) == []
    after["plan"]["device"] = "cuda"
    (elsewhere,) = (caveat for caveat in caveats(before, after, compare(before, after)))
    assert elsewhere == "the runs differ in device: cpu and cuda"
    for result in after["results"]:
        result["barrier"] = "bootstrap"
        result["contestants"]["ours"]["environment"] = {"provider": "efa", "fabric": "efa-direct"}
    assert list(caveats(before, after, compare(before, after))) == [
        elsewhere,
        "the runs differ in barrier: shared memory and bootstrap",
        "the runs differ in provider: tcp and efa",
        "the runs differ in fabric: none and efa-direct",
    ]


def test_reports_know_every_contestant() -> None:
    """By the name that it has in results."""
    plan = replace(
        PLAN, against=tuple(name for name in OPPONENTS if name != "mpi")
    )  # to import it starts MPI
    assert {kind.name for kind in plan.contestants()} | {"mpi_alltoallv"} == LABELS.keys()


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """A wrong file is an error with its name, not a stack trace."""
    path = tmp_path / "other.json"
    for text in ("{}", "not json", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=r"other\.json"):
            results.read(path)


class Collected(HTMLParser):
    """The tags and references of a page."""

    def __init__(self, text: str) -> None:
        """Parse."""
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_report_needs_nothing_from_elsewhere() -> None:
    """One file: plots inside, no script, no reference out of it, and no words of the run become markup."""
    other = replace(CELL, world=8)
    page = report(document({CELL: rounds(1, 100, 2), other: rounds(2, 200, 2)}))
    collected = Collected(page)
    assert collected.tags.count("svg") == 5
    assert "script" not in collected.tags
    assert "link" not in collected.tags
    assert [reference for reference in collected.references if not reference.startswith("#")] == []
    assert collected.tags.count("tr") > 8
