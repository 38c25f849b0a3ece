"""Plots of result files as PNG and SVG, legible on a light page and on a dark one: no background, lines in grey.

Each states what was measured in its title; the caption with device, versions and date stands under the table of the
same result file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.peers import UNDER_AUTOCAST

GREY = "#808080"
CYCLE = ["#3b82d6", "#e0822d", "#2f9e6e", "#c0504d", "#8a63d2", "#b08a1e", "#d6589f", "#14a3b8", "#7a8b2f", "#6b5b4b"]
STYLE = {
    "svg.hashsalt": "sampled-sae",  # the same file in every run
    "svg.fonttype": "none",
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "legend.framealpha": 0.0,
}
Result = dict[str, Any]


def write_plots(results: dict[str, Result], folder: Path) -> list[Path]:
    """The plots of the results that are there; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with rc_context(STYLE):
        for name, plot in PLOTS.items():
            if name in results:
                written += saved(plot(results[name]), folder, name)
    return written


def saved(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a PNG and an SVG, the same bytes of the same figure."""
    files = {folder / f"{name}.png": {"Software": None}, folder / f"{name}.svg": {"Date": None}}
    for file, metadata in files.items():
        figure.savefig(file, dpi=150, transparent=True, metadata=metadata)
    return list(files)


def axes_of(columns: int, rows: int = 1, width: float = 5.2, height: float = 3.8) -> tuple[Figure, Sequence[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def peer_steps(result: Result) -> Figure:
    """A bar for each candidate at each size: multiples of the encoder product, p20 to p80 as a line."""
    timed = [row for row in result["rows"] if "reason" not in row][::-1]
    sizes = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    figure, axes = axes_of(len(sizes), height=4.4)
    for axis, size in zip(axes, sizes, strict=True):
        rows = [row for row in timed if row["workload"] == size]
        colors = ["C0" if row["candidate"].startswith("ours") else "C1" for row in rows]
        ratios = [row["ratio"] for row in rows]
        errors = [[row["ratio"] - row["ratio_p20"] for row in rows], [row["ratio_p80"] - row["ratio"] for row in rows]]
        names = [row["candidate"] for row in rows]
        bars = axis.barh(names, ratios, xerr=errors, color=colors, ecolor=GREY)
        axis.bar_label(bars, [f" {ratio:.1f}" for ratio in ratios], padding=4)
        axis.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axis.margins(x=0.2)
        axis.set_xlabel("training step / encoder product")
        axis.set_title("B={B}, d={d}, F={F}, k={k}".format(**rows[0]))
    return figure


def scaling(result: Result) -> Figure:
    """Against each size milliseconds, with the encoder product as the floor, and below peak memory, with [B, F]."""
    names = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    measures = {
        "step_ms": ("ms a training step", "encoder product", lambda row: row["floor_ms"]),
        "peak_mb": ("peak extra memory, MB", "a float32 [B, F]", lambda row: 4e-6 * row["B"] * row["F"]),
    }
    figure, axes = axes_of(len(names), len(measures), width=4.0)
    places = [(measure, name) for measure in measures for name in names]
    for axis, (measure, name) in zip(axes, places, strict=True):
        label, beside, yardstick = measures[measure]
        rows = [{**row, "peak_mb": 1e-6 * row["peak_bytes"]} for row in result["rows"] if row["workload"] == name]
        for rule in dict.fromkeys(row["candidate"] for row in rows):
            line(axis, [row for row in rows if row["candidate"] == rule], "value", measure, rule)
        dashed = {row["value"]: yardstick(row) for row in rows}
        axis.plot(list(dashed), list(dashed.values()), color=GREY, linestyle="--", label=beside)
        axis.set(yscale="log", xlabel=name, ylabel=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(size_label))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title("d={d}".format(**rows[0]) + "".join(f", {n}={rows[0][n]}" for n in "BFk" if n != name))
    # the same lines stand in all columns, and the same rules in both rows
    handles, labels = axes[0].get_legend_handles_labels()
    _, below = axes[len(names)].get_legend_handles_labels()
    labels[-1] = f"above {labels[-1]}, below {below[-1]}"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def equal_time(result: Result) -> Figure:
    """FVU and loss recovered on held-out text against seconds of steps; autocast dotted, in its library's colour."""
    rows = [row for row in result["rows"] if "fvu" in row]
    measures = {"fvu": "FVU", "loss_recovered": "loss recovered"}
    measures = {name: label for name, label in measures.items() if name in rows[0]}
    figure, axes = axes_of(len(measures), height=4.6)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(without_autocast(row) for row in rows))}
    for axis, (measure, label) in zip(axes, measures.items(), strict=True):
        for candidate in dict.fromkeys(row["candidate"] for row in rows):
            of = [row for row in rows if row["candidate"] == candidate]
            exact = without_autocast(of[0])
            style = ":" if exact != candidate else "-" if candidate.startswith("ours") else "--"
            line(axis, of, "seconds", measure, candidate, linestyle=style, color=colours[exact])
        axis.set(xlabel="seconds of training steps", ylabel=f"{label}, held-out text at L0 = k")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    about = {**result["activations"]["sae"], **rows[0]}
    figure.suptitle("{model}, layer {layer}: F={F}, k={k}, batches of {B} tokens".format(**about))
    return figure


def without_autocast(row: Result) -> str:
    """The candidate of a row, or what it is under autocast."""
    return str(row["candidate"]).removesuffix(UNDER_AUTOCAST)


def size_label(value: float, position: int) -> str:
    """1048576 as 1M, 16384 as 16k."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def line(axis: Axes, rows: Sequence[Result], x: str, y: str, label: str, **style: Any) -> None:
    axis.plot([row[x] for row in rows], [row[y] for row in rows], marker="o", markersize=4, label=label, **style)


PLOTS: dict[str, Callable[[Result], Figure]] = {"peer_steps": peer_steps, "scaling": scaling, "equal_time": equal_time}
