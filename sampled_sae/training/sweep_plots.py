"""Plots of a sweep, as PNG; needs the extra `plot`.

Seeds are a line, their mean, in a band from the least to the greatest. Each line of a plot has a colour of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..support.figures import new_figure, save_figure
from .evaluation import HISTOGRAM_EDGES
from .sweep_table import read_metrics, without_seed

Row = dict[str, Any]
# matplotlib's own of ten colours; more are taken around the wheel
FEW = 10


def plot_sweep(rows: list[Row], folder: Path) -> list[Path]:
    """Writes quality.png, training.png and frequency.png into `folder`; returns their paths.

    Raises:
        ImportError: when matplotlib is missing, saying what to install.
    """
    figures = {"quality": quality(rows), "training": training(rows, folder), "frequency": frequency(rows)}
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def quality(rows: list[Row]) -> Any:
    """FVU, features in use and loss recovered against l, a line for each score; SAEs without a pool as level lines."""
    shown = [("fvu", "FVU, held out"), ("features_for_90", "features that hold 90% of entries")]
    if all(row.get("loss_recovered_zero") is not None for row in rows):
        shown.append(("loss_recovered_zero", "loss recovered"))
    figure, axes = _figure(len(shown))
    of_score = _grouped(rows, lambda row: row["score"] if row["l"] is not None else without_seed(row))
    colors = dict(zip(of_score, _colors(len(of_score))))
    for axis, (column, label) in zip(axes, shown):
        for name, own in of_score.items():
            if own[0]["l"] is None:
                (mean,), (low,), (high,) = _spread([[row[column]] for row in own])
                axis.axhspan(low, high, color=colors[name], alpha=0.2, linewidth=0)
                axis.axhline(mean, color=colors[name], linestyle="--", label=name)
            else:
                at = _grouped(sorted(own, key=lambda row: row["l"]), lambda row: row["l"])
                spreads = np.hstack([_spread([[row[column]] for row in seeds]) for seeds in at.values()])
                _line(axis, list(at), spreads, colors[name], name, marker="o")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="pool multiplier l", ylabel=label)
    return _with_legend(figure, axes)


def training(rows: list[Row], folder: Path) -> Any:
    """FVU and realised L0 of the batch against tokens, from the metrics of the runs."""
    figure, axes = _figure(2)
    for (name, own), color in _in_colors(rows):
        runs = [read_metrics(folder / row["name"]) for row in own]
        length = min(map(len, runs))
        for axis, metric in zip(axes, ("fvu", "l0")):
            values = _spread([[line[metric] for line in run[:length]] for run in runs])
            _line(axis, [line["tokens"] for line in runs[0][:length]], values, color, name, linewidth=1)
    axes[0].set_yscale("log")
    for axis, label in zip(axes, ("FVU of the batch", "realised L0 of the batch")):
        axis.set(xlabel="tokens", ylabel=label)
    return _with_legend(figure, axes)


def frequency(rows: list[Row]) -> Any:
    """How many features are active how often."""
    figure, (axis,) = _figure(1, height=4.6)
    centres = [(a * b) ** 0.5 if a else b / 3 for a, b in pairwise(HISTOGRAM_EDGES)]
    for (name, own), color in _in_colors(rows):
        _line(axis, centres, _spread([row["frequency_histogram"] for row in own]), color, name, linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("symlog")
    axis.set_ylim(bottom=0)  # of counts there are none below
    axis.set(xlabel="share of tokens that activate the feature", ylabel="features")
    return _with_legend(figure, [axis])


def _figure(columns: int, height: float = 4.2) -> tuple[Any, list[Any]]:
    figure = new_figure(5.2 * columns, height)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _with_legend(figure: Any, axes: Sequence[Any]) -> Any:
    """One legend of all axes, below them and off their curves."""
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 3 * len(axes)), fontsize=8)
    return figure


def _line(axis: Any, x: Sequence[float], values: Any, color: Any, name: str, **style: Any) -> None:
    """values: as `_spread` gives them."""
    mean, low, high = values
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, mean, color=color, label=name, **style)


def _spread(runs: Sequence[Sequence[float | None]]) -> Any:
    """[3, n]: mean, least and greatest at each place of runs of one length; NaN where one of them has no number."""
    values = np.array(runs, dtype=float)  # None is NaN, as is what is made of it
    return np.stack([values.mean(0), values.min(0), values.max(0)])


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _in_colors(rows: list[Row]) -> Iterable[tuple[tuple[str, list[Row]], Any]]:
    """((name without seed, its rows), a colour) of each kind of SAE."""
    kinds = _grouped(rows, without_seed)
    return zip(kinds.items(), _colors(len(kinds)))


def _colors(n: int) -> list[Any]:
    """n colours, no two alike."""
    from matplotlib import colormaps

    if n <= FEW:
        return [colormaps["tab10"](i) for i in range(n)]
    return [colormaps["turbo"](0.05 + 0.9 * i / (n - 1)) for i in range(n)]
