"""Plots of a sweep, as PNG; needs the extra `plot`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ..support.atomic_files import write_atomically
from .evaluation import HISTOGRAM_EDGES
from .sweep_table import read_metrics


def plot_sweep(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes quality.png, training.png and frequency.png into `folder`; returns their paths.

    Raises:
        ImportError: when matplotlib is missing, saying what to install.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "sampled-sae[plot]"') from None
    matplotlib.use("Agg", force=False)
    return [_quality(rows, folder), _training(rows, folder), _frequency(rows, folder)]


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return path


def _quality(rows: list[dict[str, Any]], folder: Path) -> Path:
    """FVU, features in use and loss recovered against l, a line for each score; SAEs without a pool as level lines."""
    shown = [("fvu", "FVU (held out)"), ("features_for_90", "features holding 90% of entries")]
    if all(row.get("loss_recovered_zero") is not None for row in rows):
        shown.append(("loss_recovered_zero", "loss recovered"))
    figure, axes = _figure(len(shown))
    for axis, (column, label) in zip(axes, shown):
        for score in sorted({row["score"] for row in rows if row["score"]}):
            points = sorted((row["l"], row[column]) for row in rows if row["score"] == score)
            axis.plot(*zip(*points), marker="o", label=score)
        for row in rows:
            if row["score"] is None:
                dash = "--" if row["name"].startswith("topk") else ":"
                axis.axhline(row[column], linestyle=dash, color="gray", label=row["name"])
        axis.set_xscale("log", base=2)
        axis.set_xlabel("pool multiplier l")
        axis.set_title(label)
    axes[0].legend(fontsize=8)
    return _save(figure, folder / "quality.png")


def _training(rows: list[dict[str, Any]], folder: Path) -> Path:
    figure, (left, right) = _figure(2)
    for row in rows:
        metrics = read_metrics(folder / row["name"])
        tokens = [line["tokens"] for line in metrics]
        left.plot(tokens, [line["fvu"] for line in metrics], label=row["name"], linewidth=1)
        right.plot(tokens, [line["l0"] for line in metrics], linewidth=1)
    left.set_yscale("log")
    left.set_title("FVU of the batch")
    right.set_title("realised L0 of the batch")
    for axis in (left, right):
        axis.set_xlabel("tokens")
    left.legend(fontsize=7)
    return _save(figure, folder / "training.png")


def _frequency(rows: list[dict[str, Any]], folder: Path) -> Path:
    """How many features are active how often."""
    figure, (axis,) = _figure(1)
    centres = [(a * b) ** 0.5 if a else b / 3 for a, b in pairwise(HISTOGRAM_EDGES)]
    for row in rows:
        axis.plot(centres, row["frequency_histogram"], label=row["name"], linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("symlog")
    axis.set_xlabel("share of tokens that activate the feature")
    axis.set_title("features")
    axis.legend(fontsize=7)
    return _save(figure, folder / "frequency.png")
