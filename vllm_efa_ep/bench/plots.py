"""The plots of the report, as SVG text that needs nothing outside of itself."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_efa_ep.bench.results import CellResult, Entry

# Text stays text, in the reader's own fonts: small, and it can be searched and read aloud.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-efa-ep",
    "font.family": "sans-serif",
    "font.size": 9,
}
_MOST_PANELS_PER_ROW = 3
LABELS = {
    "ours": "vllm-efa-ep",
    "ours_elsewhere": "vllm-efa-ep, ordinary tensors",
    "gloo_allgather": "gloo all-gather/reduce-scatter",
    "gloo_alltoall": "gloo all-to-all",
    "nccl_allgather": "NCCL all-gather/reduce-scatter",
    "nccl_alltoall": "NCCL all-to-all",
    "mpi_alltoallv": "MPI alltoallv",
}


class Plot(NamedTuple):
    """One figure of the report."""

    name: str
    caption: str
    svg: str


def plots(results: Sequence[CellResult]) -> list[Plot]:
    """Return every plot that the results have enough cells for."""
    with matplotlib.rc_context(_STYLE):
        found = [_latency(results, "tokens", "tokens per rank")]
        if len({result["cell"]["world"] for result in results}) > 1:
            found.append(_latency(results, "world", "ranks"))
        found.append(_breakdown(results))
        if any(result["cell"]["world"] > result["cell"]["ranks_per_node"] for result in results):
            found.extend([_work_requests(results), _wire_bytes(results)])
    return found


def _latency(results: Sequence[CellResult], along: str, label: str) -> Plot:
    """Draw p50 lines with a band up to p99, one panel per set of the other attributes."""

    def draw(axes: Axes, cells: list[CellResult]) -> None:
        for name in cells[0]["contestants"]:
            entries = [(result["cell"][along], result["contestants"][name]) for result in cells]
            entries.sort(key=lambda pair: pair[0])
            x = [value for value, _ in entries]
            p50 = [entry["round_us"]["p50"] for _, entry in entries]
            p99 = [entry["round_us"]["p99"] for _, entry in entries]
            width = 2.2 if name == "ours" else 1.2
            (line,) = axes.plot(x, p50, "o-", label=LABELS[name], linewidth=width, markersize=3)
            axes.fill_between(x, p50, p99, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({result["cell"][along] for result in cells}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("round, µs")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)

    others = [name for name in ("world", "ranks_per_node", "hidden", "dtype", "tokens") if name != along]
    if along == "world":
        others.remove("ranks_per_node")
    caption = f"Round latency against {label}: median (line) to 99th percentile (band), slowest rank."
    return _panels(f"latency-{along}", caption, _grouped(results, others), draw)


def _breakdown(results: Sequence[CellResult]) -> Plot:
    """Draw a stacked bar per cell: the halves, and how much of each was waiting."""

    def draw(axes: Axes, cells: list[CellResult]) -> None:
        ticks = [str(result["cell"]["tokens"]) for result in cells]
        bottom = [0.0] * len(cells)
        for index, half in enumerate(cells[0]["contestants"]["ours"]["steps_us"]):
            entries = [result["contestants"]["ours"] for result in cells]
            total = [entry["steps_us"][half]["p50"] for entry in entries]
            waiting = [min(_wait_us(entry, half), value) for entry, value in zip(entries, total, strict=True)]
            working = [value - wait for value, wait in zip(total, waiting, strict=True)]
            colour = f"C{index}"
            axes.bar(ticks, working, bottom=bottom, color=colour, label=half)
            bottom = [low + value for low, value in zip(bottom, working, strict=True)]
            axes.bar(ticks, waiting, bottom=bottom, color=colour, alpha=0.4, hatch="///", edgecolor="white")
            bottom = [low + value for low, value in zip(bottom, waiting, strict=True)]
        axes.set_xlabel("tokens per rank")
        axes.set_ylabel("µs")
        axes.legend(fontsize=7)

    caption = (
        "Where a round's time goes: median of each half over ranks; hatched: the mean part of it that is "
        "waiting for other ranks."
    )
    return _panels(
        "breakdown", caption, _grouped(results, ["world", "ranks_per_node", "hidden", "dtype"]), draw
    )


def _work_requests(results: Sequence[CellResult]) -> Plot:
    def draw(axes: Axes, cells: list[CellResult]) -> None:
        ticks = [str(result["cell"]["tokens"]) for result in cells]
        writes = [result["contestants"]["ours"]["per_round"]["writes"] for result in cells]
        bars = axes.bar(ticks, writes, color="C0")
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
        axes.set_xlabel("tokens per rank")
        axes.set_ylabel("writes per rank and round")

    caption = "Work requests: RDMA writes that a rank posts per round, dispatch and combine together."
    return _panels(
        "work-requests", caption, _grouped(results, ["world", "ranks_per_node", "hidden", "dtype"]), draw
    )


def _wire_bytes(results: Sequence[CellResult]) -> Plot:
    def draw(axes: Axes, cells: list[CellResult]) -> None:
        tokens = [result["cell"]["tokens"] for result in cells]
        written = [result["contestants"]["ours"]["per_round"]["bytes_written"] for result in cells]
        axes.plot(tokens, written, "o-", label="written", markersize=3)
        axes.plot(tokens, [result["wire_floor_bytes"] for result in cells], "k:", label="floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_xlabel("tokens per rank")
        axes.set_ylabel("bytes per rank and round")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)

    caption = (
        "Bytes on the wire against the floor: one row of payload per (token, remote node) each way, which "
        "nobody who moves rows unchanged can go below."
    )
    return _panels(
        "wire-bytes", caption, _grouped(results, ["world", "ranks_per_node", "hidden", "dtype"]), draw
    )


def _wait_us(entry: Entry, half: str) -> float:
    return entry["per_round"].get(f"wait_{half}_s", 0.0) * 1e6


def _grouped(results: Iterable[CellResult], names: Sequence[str]) -> dict[str, list[CellResult]]:
    """Group cells by attributes; the title says them."""
    words = {
        "world": "{} ranks",
        "ranks_per_node": "{} per node",
        "hidden": "hidden {}",
        "dtype": "{}",
        "tokens": "{} tokens",
    }
    groups: dict[str, list[CellResult]] = {}
    for result in results:
        title = ", ".join(words[name].format(result["cell"][name]) for name in names)
        groups.setdefault(title, []).append(result)
    for cells in groups.values():
        cells.sort(key=lambda result: int(result["cell"]["tokens"]))
    return groups


def _panels(
    name: str,
    caption: str,
    groups: dict[str, list[CellResult]],
    draw: Callable[[Axes, list[CellResult]], None],
) -> Plot:
    columns = min(len(groups), _MOST_PANELS_PER_ROW)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    for index, (title, cells) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        draw(axes, cells)
        axes.set_title(title, fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Title": caption})
    svg = text.getvalue()
    return Plot(name, caption, svg[svg.index("<svg") :])
