"""The JSON file of a run: what was measured, of what, and where."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from vllm_efa_ep.bench.measure import Timings
from vllm_efa_ep.bench.problem import Cell
from vllm_efa_ep.errors import ConfigurationError

SCHEMA = "vllm-efa-ep bench 1"


class Percentiles(TypedDict):
    """Microseconds."""

    p50: float
    p99: float


class Entry(TypedDict):
    """One contestant in one cell.

    ``round_us`` is of the slowest rank of each iteration, whose samples are ``rounds_us``; ``dispatch_us``,
    ``combine_us`` and ``steps_us`` are over all ranks and iterations. ``per_round`` are counters, mean over
    ranks.
    """

    round_us: Percentiles
    dispatch_us: Percentiles
    combine_us: Percentiles
    steps_us: dict[str, Percentiles]
    per_round: dict[str, float]
    tokens_per_s: float
    logical_gbytes_per_s: float
    environment: dict[str, Any]
    rounds_us: list[float]


class CellResult(TypedDict, total=False):
    """One cell of one process start: either ``contestants`` or, if it was not measured, ``left_out``."""

    cell: dict[str, Any]
    start: int
    barrier: str
    wire_floor_bytes: float
    contestants: dict[str, Entry]
    left_out: str


class Document(TypedDict):
    """The whole file."""

    schema: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    results: list[CellResult]


def entry(cell: Cell, timings: Timings, environment: dict[str, Any]) -> Entry:
    """Return what is kept of a contestant's timings.

    ``logical_gbytes_per_s`` counts, per rank, dispatch and combine payload of every (token, expert) pair:
    the numerator that published comparisons use, whatever a system really moves.
    """
    rounds = timings.rounds_us()
    seconds = float(np.median(rounds)) / 1e6
    logical_bytes = cell.tokens * cell.top_k * (cell.row_bytes + cell.combine_row_bytes)
    return {
        "round_us": percentiles(rounds),
        "dispatch_us": percentiles(timings.operation_us("dispatch")),
        "combine_us": percentiles(timings.operation_us("combine")),
        "steps_us": {step: percentiles(timings.step_us(step)) for step in timings.steps},
        "per_round": timings.per_round,
        "tokens_per_s": cell.world * cell.tokens / seconds,
        "logical_gbytes_per_s": logical_bytes / seconds / 1e9,
        "environment": environment,
        "rounds_us": np.round(rounds, 1).tolist(),
    }


def percentiles(microseconds: npt.NDArray[np.float64]) -> Percentiles:
    """Return median and 99th percentile."""
    return {
        "p50": float(np.median(microseconds)),
        "p99": float(np.percentile(microseconds, 99)),
    }


def write(path: Path, document: Document) -> None:
    """Write the file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


def read(path: Path) -> Document:
    """Read a file.

    Raises:
        ConfigurationError: It is not one of ours.

    """
    try:
        document: Document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as a benchmark result: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigurationError(f"{path} is not a result of this version of `vllm-efa-ep bench` ({SCHEMA})")
    return document


def measured(results: Sequence[CellResult]) -> list[CellResult]:
    """Return the cells that were not left out."""
    return [result for result in results if "contestants" in result]
