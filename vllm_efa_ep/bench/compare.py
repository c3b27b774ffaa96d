"""``vllm-efa-ep bench compare``: two result files, cell by cell, without claiming more than they show.

The quantity is the median round time. Its spread comes from a bootstrap that resamples process starts first
and iterations inside them second, since starts differ by more than iterations do. With one start in a file
the interval covers iterations only, and the comparison says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_efa_ep.bench.results import Document, measured

RESAMPLES = 2000
CONFIDENCE = 0.95
# Differences that change the machine or the method; a ratio across them compares more than the code.
_MUST_MATCH = ("cpu", "cores")
_NETWORK = ("provider", "fabric")

Key = tuple[tuple[str, object], ...]
Starts = list[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """One contestant in one cell of both files.

    Attributes:
        cell: The cell's attributes.
        contestant: Who.
        before_us: Median of the first file.
        after_us: Median of the second.
        ratio: ``after_us / before_us``; below 1 the second is faster.
        low: Lower end of the ratio's confidence interval.
        high: Upper end.
        starts: Process starts in the file that has fewer.

    """

    cell: dict[str, object]
    contestant: str
    before_us: float
    after_us: float
    ratio: float
    low: float
    high: float
    starts: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.low <= 1 <= self.high:
            return "no difference shown"
        return "faster" if self.high < 1 else "slower"


def compare(before: Document, after: Document) -> list[Comparison]:
    """Return the comparison of everything that both documents measured."""
    first, second = _samples(before), _samples(after)
    random = np.random.default_rng(0)
    found = []
    for key in first:
        if key not in second:
            continue
        medians = [_median(starts) for starts in (first[key], second[key])]
        ratios = _resampled(second[key], random) / _resampled(first[key], random)
        low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        attributes = dict(key)
        contestant = str(attributes.pop("contestant"))
        found.append(
            Comparison(
                attributes,
                contestant,
                medians[0],
                medians[1],
                medians[1] / medians[0],
                float(low),
                float(high),
                min(len(first[key]), len(second[key])),
            )
        )
    return found


def caveats(before: Document, after: Document, found: Sequence[Comparison]) -> Iterator[str]:
    """Yield what a reader must know beside the ratios."""
    hosts = before["environment"]["host"], after["environment"]["host"]
    for name in _MUST_MATCH:
        if hosts[0][name] != hosts[1][name]:
            yield f"the machines differ in {name}: {hosts[0][name]} and {hosts[1][name]}"
    for name in ("effort", "seed"):
        values = before["plan"][name], after["plan"][name]
        if values[0] != values[1]:
            yield f"the runs differ in {name}: {values[0]} and {values[1]}"
    first, second = _conditions(before, after), _conditions(after, before)
    for name in first:
        if first[name] != second[name]:
            yield f"the runs differ in {name}: {first[name]} and {second[name]}"
    if any(each.starts == 1 for each in found):
        yield (
            "one process start in a file: the intervals cover iterations, not starts, and are too narrow to "
            "settle small differences; use --starts 4 or more on both sides"
        )
    if not found:
        yield "the files have no cell in common"


def _conditions(document: Document, other: Document) -> dict[str, str]:
    """Return what rounds depend on beside the cell, in the cells that the other document has, too."""
    there = [each["cell"] for each in measured(other["results"])]
    results = [each for each in measured(document["results"]) if each["cell"] in there]
    networks = [each["contestants"]["ours"]["environment"] for each in results]
    values = {
        "device": {document["plan"].get("device", "cpu")},  # files are older than the choice of one
        "barrier": {each["barrier"] for each in results},
        **{name: {str(network.get(name) or "none") for network in networks} for name in _NETWORK},
    }
    return {name: " or ".join(sorted(each)) for name, each in values.items()}


def _samples(document: Document) -> dict[Key, Starts]:
    samples: dict[Key, Starts] = {}
    for result in measured(document["results"]):
        for name, entry in result["contestants"].items():
            key = (*sorted(result["cell"].items()), ("contestant", name))
            samples.setdefault(key, []).append(np.array(entry["rounds_us"]))
    return samples


def _median(starts: Starts) -> float:
    return float(np.median([np.median(start) for start in starts]))


def _resampled(starts: Starts, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the medians of ``RESAMPLES`` resampled sets of starts."""
    medians = np.stack(
        [np.median(random.choice(start, (RESAMPLES, len(start))), axis=1) for start in starts], axis=1
    )
    picked = random.integers(len(starts), size=medians.shape)
    resampled: npt.NDArray[np.float64] = np.median(np.take_along_axis(medians, picked, axis=1), axis=1)
    return resampled
