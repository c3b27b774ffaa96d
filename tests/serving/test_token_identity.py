"""Served with expert parallelism over our backends, every model answers exactly as in one process."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm_server import FAMILIES, PROMPTS, Server, efaemu_directory, read_stats, reserved_port, serve

# vLLM starts as many as data-parallel ranks, each of which takes seconds.
ONE_API_SERVER = ("--api-server-count", "1")
LAYOUTS = {"high_throughput": "per_token", "low_latency": "per_expert"}


@dataclass(frozen=True)
class Case:
    """One way to serve a model.

    ``ranks_per_node`` makes the ranks of this one machine play several nodes, with a network between them.
    """

    family: str
    backend: str
    tensor_parallel: int = 1
    compiled: bool = False
    provider: str = "auto"
    ranks_per_node: int = 1
    by_environment: bool = False

    @property
    def ranks(self) -> int:
        """Size of the EP group: two data-parallel ranks times the tensor-parallel ones."""
        return 2 * self.tensor_parallel

    @property
    def nodes(self) -> int:
        """How many nodes the ranks play."""
        return self.ranks // self.ranks_per_node

    def __str__(self) -> str:
        """Return the name of the test."""
        mode = "compiled" if self.compiled else "eager"
        chosen = "env" if self.by_environment else "flag"
        nodes = f"{self.nodes}x{self.ranks_per_node}"
        return f"{self.family}-{self.backend}-{nodes}-{mode}-{self.provider}-{chosen}"

    def server_flags(self) -> list[str]:
        """Return the flags of ``vllm serve``."""
        return [
            *("--enable-expert-parallel", "--data-parallel-size", "2"),
            *("--tensor-parallel-size", str(self.tensor_parallel)),
            *([] if self.by_environment else ["--all2all-backend", f"efa_ep_{self.backend}"]),
            *([] if self.compiled else ["--enforce-eager"]),
        ]

    def start(self, model: Path, directory: Path) -> AbstractContextManager[Server]:
        """Start one server for all ranks."""
        flags = [*self.server_flags(), *ONE_API_SERVER]
        return serve(model, flags, self.environment(directory / "stats"), directory / "server.log")

    def environment(self, stats: Path) -> dict[str, str]:
        """Return our settings, and where libfabric finds the provider of the tests."""
        chosen = {"EFA_EP_BACKEND": self.backend} if self.by_environment else {}
        emulated = {"FI_PROVIDER_PATH": str(efaemu_directory())} if self.provider == "efaemu" else {}
        return (
            chosen
            | emulated
            | {
                "EFA_EP_STATS_DIR": str(stats),
                "EFA_EP_RANKS_PER_NODE": str(self.ranks_per_node),
                "EFA_EP_PROVIDER": self.provider,
            }
        )


# Every family, backend, compilation mode, node shape, provider and way to select at least once.
SHORT_CASES = (
    Case("qwen3_moe", "high_throughput"),
    Case("qwen2_moe", "low_latency", tensor_parallel=2, ranks_per_node=2),
    Case("deepseek_v2", "low_latency", compiled=True, by_environment=True),
    Case("mixtral", "high_throughput", compiled=True, provider="efaemu", by_environment=True),
)
# vLLM 0.32 and 0.33 take a batch of one token of DeepSeek for a whole one where tensor and data parallelism
# meet (`DeepseekV2DecoderLayer.forward` compares token counts), with any backend.
TENSOR_PARALLEL_FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")
# Two ranks over TCP for every family, backend and mode, four over efaemu where possible; other shapes once.
LONG_CASES = (
    *(
        Case(family, backend, compiled=compiled, provider="tcp")
        for family in FAMILIES
        for backend in LAYOUTS
        for compiled in (False, True)
    ),
    *(
        Case(family, backend, 2, compiled, provider="efaemu", ranks_per_node=2)
        for family in TENSOR_PARALLEL_FAMILIES
        for backend in LAYOUTS
        for compiled in (False, True)
    ),
    *(
        Case("qwen2_moe", backend, tensor_parallel, ranks_per_node=ranks_per_node)
        for backend in LAYOUTS
        for tensor_parallel, ranks_per_node in ((1, 2), (2, 1), (2, 4))
    ),
)


def assert_same_tokens(actual: list[list[int]], expected: list[list[int]]) -> None:
    """Compare the continuations, naming the prompts that differ."""
    differing = [
        f"{prompt!r}: {got} instead of {wanted}"
        for prompt, got, wanted in zip(PROMPTS, actual, expected, strict=True)
        if got != wanted
    ]
    assert not differing, "\n".join(differing)


def assert_rows_moved(case: Case, stats: Path) -> None:
    """Check from the ranks' own counters that the experts' rows went through our backend."""
    exported = read_stats(stats)
    assert sorted(exported) == list(range(case.ranks))
    for rank in exported.values():
        (counters,) = rank["all_to_alls"]
        summary = json.dumps(counters)
        assert counters["layout"] == LAYOUTS[case.backend]
        assert counters["nodes"] == case.nodes
        assert counters["rounds"] > 0, summary
        assert counters["received_rows"] > 0, summary
        if case.nodes > 1:
            assert counters["network_rows"] > 0, summary
            assert counters["writes"] >= 2 * (case.nodes - 1) * (counters["rounds"] - 1), summary
            if case.provider != "auto":
                assert counters["provider"] in (case.provider, "net"), summary


def run(case: Case, models: dict[str, Path], expected: list[list[int]], directory: Path) -> None:
    """Serve the case, compare its answers, check its counters."""
    with case.start(models[case.family], directory) as server:
        server.wait_until_healthy()
        assert_same_tokens(server.complete_all(), expected)
        rounds = server.metrics()["efa_ep_rounds_total"]
        assert set(rounds) == {(LAYOUTS[case.backend], str(rank)) for rank in range(case.ranks)}
    assert_rows_moved(case, directory / "stats")


@pytest.mark.parametrize("case", SHORT_CASES, ids=str)
def test_tokens_equal_one_process(
    case: Case, models: dict[str, Path], references: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """A covering choice of the matrix."""
    run(case, models, references[case.family], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_tokens_equal_one_process_full_matrix(
    case: Case, models: dict[str, Path], references: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """The rest of the matrix."""
    run(case, models, references[case.family], tmp_path)


@pytest.mark.parametrize("backend", ["low_latency", pytest.param("high_throughput", marks=pytest.mark.long)])
def test_two_servers_as_two_nodes(
    backend: str, models: dict[str, Path], references: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Two ``vllm serve``, the second one headless, as on two machines."""
    case = Case("qwen3_moe", backend)
    stats = tmp_path / "stats"
    flags = [
        *case.server_flags(),
        *("--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1"),
    ]
    model, environment = models[case.family], case.environment(stats)
    with reserved_port() as rpc_port:
        flags += ["--data-parallel-rpc-port", str(rpc_port)]
        first_flags = [*flags, *ONE_API_SERVER]
        second_flags = [*flags, "--headless", "--data-parallel-start-rank", "1"]
        with (
            serve(model, first_flags, environment, tmp_path / "first.log") as first,
            serve(model, second_flags, environment, tmp_path / "second.log") as second,
        ):
            wait_for_both(first, second)
            assert_same_tokens(first.complete_all(), references[case.family])
    assert_rows_moved(case, stats)


def wait_for_both(first: Server, second: Server) -> None:
    """Wait for the API server of the first; report the log of the second too if it fails."""
    try:
        first.wait_until_healthy()
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeError(f"{error}\nthe second server:\n{second.log_tail()}") from error
