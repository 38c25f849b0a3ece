"""The study's plots: what is gained and lost, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.plots import STYLE, axes_of, saved
from benchmarks.study_parts import report_real
from benchmarks.study_parts.rows import Row, Rows, spread
from benchmarks.study_parts.variants import REAL, SYNTHETIC

KINDS = {"top": ("o", "C0"), "sample": ("^", "C1")}
BASELINE = ("s", "C2")
FVU_TICKS = (0.2, 0.5, 1, 2, 5)
REAL_TICKS = (0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


def write_plots(folder: Path, out: Path) -> list[Path]:
    """A PNG and an SVG in `out` for each file of rows in `folder`."""
    written: list[Path] = []
    with rc_context(STYLE):
        known = dict.fromkeys(sorted(folder.glob("synthetic_*.csv")), tradeoff)
        for path, draw in {**known, **dict.fromkeys(report_real.of_rules(folder), real_tradeoff)}.items():
            written += saved(draw(Rows(path)), out, path.stem)
    return written


def tradeoff(rows: Rows) -> Figure:
    """F1 and the features that are found against FVU, by a threshold, and MCC against l; a marker a seed."""
    figure, (detection, finding, matching) = axes_of(3, width=4.6, height=4.2)
    found = rows.of(SYNTHETIC)
    for axis, measure, label in (
        (detection, "f1", "mean F1 as detectors"),
        (finding, "found", "true features found, each counted once"),
    ):
        for name, of in found.items():
            if of[0]["threshold_f1"] is not None:
                explained = [{**row, "fvu": 1 - row["threshold_r2"]} for row in of]
                _points(axis, explained, "fvu", f"threshold_{measure}", _short(name))
        _against(axis, "FVU = 1 - R2 of the reconstruction", FVU_TICKS, label)
        axis.set_title("inference: one threshold")
    for name, of in found.items():
        if of[0]["l"] is not None:
            _points(matching, of, "l", "mcc", _short(name))
    for name, of in found.items():
        if of[0]["l"] is None and of[0]["select"] == "batch":
            mean = sum(row["mcc"] for row in of) / len(of)
            matching.axhline(mean, color="C2", linestyle="--", linewidth=1, label=name)
    matching.set_xscale("log", base=2)
    matching.set(xlabel="l", ylabel="MCC of decoder rows and true features", title="the decoder")
    return figure


def real_tradeoff(rows: Rows) -> Figure:
    """Against FVU what probes tell, where there are any, and what a batch shares; by a threshold, a marker a seed.

    SAEs that explain nothing, or less, are left out.
    """
    found = rows.of(name for name in REAL if "entropy" not in name and "uniform" not in name)
    shown = {
        "threshold_probe_topic_5": "topics by five features, area under ROC",
        "threshold_probe_speech_5": "parts of speech by five features, area under ROC",
        "threshold_first_share": "explained by the first 4k features of a batch",
    }
    shown = {measure: label for measure, label in shown.items() if spread(rows.rows, measure) is not None}
    figure, axes = axes_of(len(shown), width=4.6, height=4.2)
    fvus = [row["threshold_fvu"] for of in found.values() for row in of if (row["threshold_fvu"] or 1) < 1]
    # a tick beyond the points would widen the axis: models differ in how much is left to explain
    ticks = [tick for tick in REAL_TICKS if fvus and min(fvus) <= tick <= max(fvus)]
    for axis, (measure, label) in zip(axes, shown.items(), strict=True):
        for name, of in found.items():
            fvu = spread(of, "threshold_fvu")
            if fvu is not None and fvu[0] < 1 and spread(of, measure) is not None:
                _points(axis, of, "threshold_fvu", measure, _short(name))
        _against(axis, "FVU of held-out text", ticks, label)
    return figure


def _against(axis: Axes, fvu: str, ticks: Sequence[float], label: str) -> None:
    axis.set(xscale="log", xlabel=fvu, ylabel=label)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())


def _points(axis: Axes, rows: list[Row], x: str, y: str, text: str) -> None:
    marker, color = BASELINE if rows[0]["l"] is None else KINDS[rows[0]["pool"]]
    axis.plot([row[x] for row in rows], [row[y] for row in rows], marker, color=color, markersize=5, alpha=0.8)
    mean = [sum(row[name] for row in rows) / len(rows) for name in (x, y)]
    axis.annotate(text, mean, xytext=(5, 3), textcoords="offset points", fontsize=7, color="#808080")


def _short(name: str) -> str:
    return name.replace("sample-", "drawn ").replace("top-", "top ").replace("-l", " l=")
