"""``vllm-efa-ep bench``: time dispatch and combine, compare runs, draw the report."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_efa_ep.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_efa_ep.bench.plan import Plan
    from vllm_efa_ep.bench.results import Document

NAME = "bench"
HELP = "time dispatch and combine in any world"
REPORT_NAME = "bench.html"


def numbers(text: str) -> tuple[int, ...]:
    """Return the positive integers of a comma-separated list."""
    values = tuple(int(word) for word in text.split(","))
    if min(values) < 1:
        raise ValueError(text)
    return values


def names(text: str) -> tuple[str, ...]:
    """Return the words of a comma-separated list."""
    return tuple(word for word in text.split(",") if word)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--ranks", type=numbers, default=(2,), help="world sizes to start, e.g. 2,4")
    parser.add_argument("--ray", action="store_true", help="start them on the nodes of the Ray cluster")
    parser.add_argument(
        "--ranks-per-node", type=int, help="ranks that share memory; 1: every rank a node of its own"
    )
    parser.add_argument("--tokens", type=numbers, default=(1, 16, 128), help="tokens per rank, e.g. 1,16,128")
    parser.add_argument("--hidden", type=numbers, default=(7168,), help="hidden sizes (default 7168)")
    parser.add_argument(
        "--dtype", type=names, default=("bf16",), help="of bf16, fp32, fp8 (fp8: bf16 combine)"
    )
    parser.add_argument("--device", default="cpu", help="where the rows are: cpu (default) or cuda")
    parser.add_argument("--experts", type=int, default=256, help="experts of the layer (default 256)")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token (default 8)")
    parser.add_argument(
        "--against",
        type=names,
        default=(),
        help="of ordinary-tensors, gloo-agrs, gloo-a2a, mpi; with --device cuda also nccl-agrs, nccl-a2a",
    )
    parser.add_argument(
        "--warm-up", type=int, default=20, help="rounds before the first timed one (default 20)"
    )
    parser.add_argument("--iterations", type=int, default=100, help="timed rounds per cell (default 100)")
    parser.add_argument("--starts", type=int, default=1, help="sets of fresh processes (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="of inputs and routes (default 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("efa_ep_bench"), help="folder of bench.json and .html"
    )
    actions = parser.add_subparsers(dest="action")
    compare = actions.add_parser("compare", help="compare two result files, cell by cell")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    report = actions.add_parser("report", help="draw the HTML report of a result file again")
    report.add_argument("results", type=Path)
    report.add_argument("html", type=Path)


def run(options: argparse.Namespace) -> int:
    """Do what the action says, by default measure.

    Raises:
        ConfigurationError: An option is out of bounds.
        EfaEpError: A rank ended with an error; on this machine, a ``RanksFailedError``.

    """
    if options.action == "compare":
        return _compare(options)
    if options.action == "report":
        from vllm_efa_ep.bench.report import write_report
        from vllm_efa_ep.bench.results import read

        write_report(read(options.results), options.html)
        print(f"written: {options.html}")
        return 0
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    from vllm_efa_ep.bench import session
    from vllm_efa_ep.bench.measure import Effort
    from vllm_efa_ep.bench.plan import Plan
    from vllm_efa_ep.bench.report import write_report
    from vllm_efa_ep.config import Settings

    settings = Settings.from_environment()
    per_node = settings.ranks_per_node if options.ranks_per_node is None else options.ranks_per_node
    plan = Plan(
        hidden=options.hidden,
        dtypes=options.dtype,
        tokens=options.tokens,
        experts=options.experts,
        top_k=options.top_k,
        against=options.against,
        effort=Effort(options.warm_up, options.iterations, options.iterations, 0.0),
        seed=options.seed,
        ranks_per_node=per_node,
        device=options.device,
    )
    plan.check()
    if options.ray:
        document = _measure_on_ray(plan, options.ranks, options.starts, options.out)
    elif session.launched_from_outside():
        joined = session.run_as_rank(plan, options.out)
        if joined is None:
            return 0
        document = joined
    else:
        plan.check_here()
        document = session.run_worlds(plan, options.ranks, options.starts, options.out)
    session.print_table(document)
    print(f"written: {options.out / session.JSON_NAME}")
    write_report(document, options.out / REPORT_NAME)
    print(f"written: {options.out / REPORT_NAME}")
    return 0


def _measure_on_ray(plan: "Plan", worlds: Sequence[int], starts: int, directory: Path) -> "Document":
    from vllm_efa_ep.bench import session

    plan.check_for_ray()
    if session.launched_from_outside():
        raise ConfigurationError(
            "--ray starts the ranks itself, but RANK and WORLD_SIZE are set, as by torchrun; unset them, or "
            "leave out --ray"
        )
    try:
        from vllm_efa_ep.bench.launch_on_ray import run_ray
        from vllm_efa_ep.bootstrap.ray_hosts import ray_cluster
    except ImportError as error:
        raise ConfigurationError(f"--ray needs Ray ({error}); `pip install 'vllm-efa-ep[ray]'`") from error
    with ray_cluster():
        return session.run_worlds(plan, worlds, starts, directory, run_ray)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from vllm_efa_ep.bench.compare import CONFIDENCE, caveats, compare
    from vllm_efa_ep.bench.results import read

    before, after = read(options.before), read(options.after)
    found = compare(before, after)
    table = Table(title=f"A = {options.before}, B = {options.after}; medians of the slowest rank in µs")
    for heading in ("cell", "who"):
        table.add_column(heading)
    for heading in ("A", "B", "B / A", f"{CONFIDENCE:.0%} interval"):
        table.add_column(heading, justify="right")
    table.add_column("B is")
    for each in found:
        cell = "{world} ranks of {ranks_per_node}, {tokens} x {hidden} {dtype}".format(**asdict(each)["cell"])
        table.add_row(
            cell,
            each.contestant,
            f"{each.before_us:.1f}",
            f"{each.after_us:.1f}",
            f"{each.ratio:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            each.verdict,
        )
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for caveat in caveats(before, after, found):
        console.print(f"note: {caveat}")
    if not found:
        raise ConfigurationError(f"{options.before} and {options.after} have no cell in common")
    return 0
