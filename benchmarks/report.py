"""The table and the plot of the round-trip benchmark."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.goals import PEERS, CellResult, median

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLOORS = {"same_node": "memcpy", "own_node": "bare_writes"}
LABELS = {
    "ours": "vllm-efa-ep",
    "ours_elsewhere": "vllm-efa-ep, ordinary tensors",
    "gloo_allgather": "gloo all-gather/reduce-scatter",
    "gloo_alltoall": "gloo all_to_all",
    "mpi_alltoallv": "Open MPI alltoallv",
    "memcpy": "floor: memcpy",
    "bare_writes": "floor: bare writes",
}
COLUMNS = ("ours", "ours_elsewhere", *PEERS, "floor")


def header() -> str:
    """Return the table's two header lines."""
    names = "".join(f" {name:>24}" for name in COLUMNS)
    return (
        "median/p99 in microseconds of the slowest rank; (x) is the median as a multiple of ours\n"
        f"{'scene':<9} {'ranks':>5} {'hidden':>6} {'dtype':>5} {'tokens':>6}{names} {'n':>4}"
    )


def line(result: CellResult) -> str:
    """Return a cell's line of the table."""
    cell = result["cell"]
    place = (
        f"{cell['scene']:<9} {cell['world']:>5} {cell['hidden']:>6} {cell['dtype']:>5} {cell['tokens']:>6}"
    )
    if "left_out" in result:
        return f"{place}  left out: {result['left_out']}"
    text = place
    for column in COLUMNS:
        name = FLOORS[cell["scene"]] if column == "floor" else column
        values = result["contestants"][name]
        ratio = "" if name == "ours" else f" ({values['median_us'] / median(result, 'ours'):.2f})"
        text += f" {number(values['median_us']) + '/' + number(values['p99_us']) + ratio:>24}"
    text += f" {result['contestants']['ours']['iterations']:>4}"
    return text


def number(microseconds: float) -> str:
    """Format with three significant digits and no exponent."""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def alone_lines(results: Sequence[CellResult]) -> list[str]:
    """Return what running beside the others costs each contestant, where that was measured."""
    lines = []
    for name in LABELS:
        ratios = sorted(
            values["median_us"] / values["alone_median_us"]
            for result in results
            for values in [result.get("contestants", {}).get(name, {})]
            if "alone_median_us" in values
        )
        if ratios:
            middle = ratios[len(ratios) // 2]
            lines.append(f"{name}: beside the others {middle:.2f}x its time alone (worst {ratios[-1]:.2f}x)")
    return lines


def plot(results: Sequence[CellResult], path: Path) -> None:
    """Draw medians over tokens: one row per scene and world, one column per dtype and hidden size."""
    measured = [result for result in results if "contestants" in result]
    rows = sorted({(result["cell"]["scene"], result["cell"]["world"]) for result in measured}, reverse=True)
    columns = sorted({(result["cell"]["dtype"], result["cell"]["hidden"]) for result in measured})
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(4 * len(columns), 3 * len(rows)), squeeze=False, sharex=True
    )
    for i, (scene, world) in enumerate(rows):
        for j, (dtype, hidden) in enumerate(columns):
            axis = axes[i][j]
            cells = [
                result
                for result in measured
                if [result["cell"][key] for key in ("scene", "world", "dtype", "hidden")]
                == [scene, world, dtype, hidden]
            ]
            for name in ("ours", "ours_elsewhere", *PEERS, FLOORS[scene]):
                tokens = [result["cell"]["tokens"] for result in cells]
                medians = [median(result, name) for result in cells]
                style = "k:" if name in FLOORS.values() else "o-"
                width = 2.5 if name == "ours" else 1.0
                axis.loglog(tokens, medians, style, label=LABELS[name], linewidth=width, markersize=3)
            axis.set_title(f"{scene.replace('_', ' ')}, {world} ranks, {hidden} {dtype}", fontsize=9)
            axis.grid(visible=True, which="major", alpha=0.3)
            if j == 0:
                axis.set_ylabel("round, microseconds", fontsize=8)
            if i == len(rows) - 1:
                axis.set_xlabel("tokens per rank", fontsize=8)
        axes[i][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
