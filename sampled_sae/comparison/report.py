"""A comparison as files: comparison.json, comparison.md, matches.csv and, with matplotlib, comparison.png."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from ..support.atomic_files import write_json, write_text
from ..support.figures import new_figure, save_figure
from .compare import Comparison

SUMMARY, TABLE, MATCHES, PLOT = "comparison.json", "comparison.md", "matches.csv", "comparison.png"


def figures(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of the table: name, value of A, of B, of both; "" where there is none."""
    on = summary.get("on_activations", {})
    cosine = summary["cosine_quantiles"]
    rows = [
        ("features", *summary["features"], ""),
        (f"shared: cosine of at least {summary['same']:g}", "", "", summary["shared"]),
        ("alone", *summary["alone"], ""),
        ("cosine of pairs, mean", "", "", summary["cosine_mean"]),
        ("cosine of pairs, 5%, 50%, 95%", "", "", ", ".join(f"{cosine[q]:.3f}" for q in ("0.05", "0.5", "0.95"))),
        ("cosine with the nearest feature, mean", *summary["nearest_cosine_mean"], ""),
    ]
    if on:
        rows += [
            (f"L0 on {on['tokens']} tokens", *on["l0"], ""),
            ("FVU", *on["fvu"], ""),
            ("active features", *on["active"], ""),
            ("active features among those alone", *on["alone_active"], ""),
            ("share of entries of those alone", *on["alone_share_of_entries"], ""),
            ("cosine of the reconstructions", "", "", on["reconstruction_cosine"]),
            ("active features whose partner is active too", "", "", on["overlap"]),
            ("tokens of a shared pair, Jaccard, median", "", "", on["jaccard_median"]),
            ("activations of a shared pair, cosine, median", "", "", on["activation_cosine_median"]),
        ]
    return rows


def table(summary: dict[str, Any], names: tuple[str, str]) -> str:
    """Markdown: what both have, a column for each SAE and one for what is of both."""
    heads = ["", *(" ".join(name.split()).replace("|", "\\|") for name in names), "both"]
    rows = (" | ".join(_cell(cell) for cell in row) for row in figures(summary))
    lines = [" | ".join(heads), "|".join(["---"] * 4), *rows]
    return "".join(f"| {line} |\n" for line in lines) + f"\nMatched by: {summary['matching']}.\n"


def write_report(comparison: Comparison, names: tuple[str, str], about: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the files but the plot; returns their paths. `about` goes into comparison.json before the figures."""
    summary = comparison.summary()
    write_json(folder / SUMMARY, {**about, **summary})
    write_text(folder / TABLE, table(summary, names))
    write_text(folder / MATCHES, _matches(comparison))
    return [folder / name for name in (SUMMARY, TABLE, MATCHES)]


def plot(comparison: Comparison, names: tuple[str, str], folder: Path) -> Path:
    """comparison.png: the cosines of pairs and of nearest features; with activations what pairs do on them.

    Raises:
        ImportError: when matplotlib is missing, saying what to install.
    """
    m, on = comparison.matching, comparison.agreement
    columns = 1 if on is None else 2
    figure = new_figure(5.6 * columns, 4.0)
    left = figure.add_subplot(1, columns, 1)
    edges = [i / 40 for i in range(-40, 41)]
    left.hist(m.cosine.clamp(-1, 1).numpy(), edges, color="tab:gray", alpha=0.5, label="pairs, one to one")
    for name, nearest, color in zip(names, (m.nearest_a, m.nearest_b), ("tab:blue", "tab:orange")):
        left.hist(
            nearest.clamp(-1, 1).numpy(), edges, histtype="step", color=color, label=f"nearest, of {_short(name)}"
        )
    left.axvline(comparison.same, color="black", linestyle=":", linewidth=1)
    left.set_xlabel("cosine of decoder rows")
    left.set_ylabel("features")
    left.set_xlim(min(0.0, *(math.floor(40 * float(c.min())) / 40 for c in (m.cosine, m.nearest_a, m.nearest_b))), 1)
    left.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    if on is not None:
        right = figure.add_subplot(1, columns, 2)
        fired = [i for i, value in enumerate(on.jaccard) if not math.isnan(value)]
        right.scatter(m.cosine.numpy()[fired], on.jaccard[fired], s=4, alpha=0.4, color="tab:gray")
        right.set_xlabel("cosine of decoder rows")
        right.set_ylabel("Jaccard of active tokens")
        right.set_ylim(-0.02, 1.02)
    return save_figure(figure, folder / PLOT)


def _matches(comparison: Comparison) -> str:
    """Every pair, then every feature without one; the columns of activations where there are some."""
    m, on = comparison.matching, comparison.agreement
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["a", "b", "cosine"]
    writer.writerow(columns if on is None else [*columns, "active_a", "active_b", "jaccard", "activation_cosine"])
    for i, (a, b, cosine) in enumerate(zip(m.a.tolist(), m.b.tolist(), m.cosine.tolist())):
        row: list[Any] = [a, b, f"{cosine:.6g}"]
        if on is not None:
            measured = [_number(on.jaccard[i]), _number(on.activation_cosine[i])]
            row += [on.active_a[a], on.active_b[b], *measured]
        writer.writerow(row)
    for a in sorted(set(range(comparison.widths[0])) - set(m.a.tolist())):
        writer.writerow([a, "", "", *([] if on is None else [on.active_a[a], "", "", ""])])
    for b in sorted(set(range(comparison.widths[1])) - set(m.b.tolist())):
        writer.writerow(["", b, "", *([] if on is None else ["", on.active_b[b], "", ""])])
    return text.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _short(name: str) -> str:
    short = name if len(name) <= 24 else f"...{name[-21:]}"
    # matplotlib would set what stands between two dollars as mathematics
    return short.replace("$", "\\$")
