"""The table of a sweep, as CSV and Markdown, and the metrics of its runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import NoneType
from typing import Any

from ..support.atomic_files import field, read_json, read_json_lines, write_text
from .evaluation import HISTOGRAM_EDGES
from .training_run import METRICS

COLUMNS = {
    "name": "SAE",
    "l": "l",
    "score": "score",
    "seed": "seed",
    "l0": "L0",
    "batch_l0": "L0 (batch)",
    "fvu": "FVU",
    "pool_fvu": "FVU (pool)",
    "explained_variance": "expl. var.",
    "cosine": "cosine",
    "loss_recovered_zero": "loss recovered",
    "ce_spliced": "CE spliced",
    "dead_share": "never active",
    "features_for_90": "features for 90%",
    "jaccard": "Jaccard",
    "seconds": "train s",
}


def without_seed(row: dict[str, Any]) -> str:
    """The name that a run has in common with those of other seeds."""
    return str(row["name"]).removesuffix(f"_seed{row['seed']}")


def read_result(path: Path) -> dict[str, Any]:
    """The evaluation of an SAE, with the types that tables and plots take.

    Raises:
        ValueError: naming the file and the field.
    """
    result = read_json(path)
    for column in COLUMNS:
        if column in result:
            field(path, result, column, (float, NoneType))
    counts = field(path, result, "frequency_histogram", list)
    if len(counts) != len(HISTOGRAM_EDGES) - 1:
        raise ValueError(f"{path}: frequency_histogram={counts!r}: must have {len(HISTOGRAM_EDGES) - 1} numbers")
    for count in counts:
        field(path, {"frequency_histogram": count}, "frequency_histogram", int, 0)
    return result


def write_table(rows: list[dict[str, Any]], folder: Path) -> None:
    """results.csv (every scalar) and results.md (the columns a reader compares)."""
    scalars = [k for k in rows[0] if not isinstance(rows[0][k], (list, dict))]
    text = io.StringIO()
    writer = csv.DictWriter(text, scalars, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.md", markdown_table(rows))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of those `COLUMNS` that at least one row has."""
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    if len({row["seed"] for row in rows}) == 1:
        columns.remove("seed")
    lines = [" | ".join(COLUMNS[c] for c in columns), "|".join("---" for _ in columns)]
    lines += [" | ".join(_cell(c, row.get(c)) for c in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column == "dead_share":
        return f"{value:.1%}"
    if column in ("l0", "batch_l0"):
        return f"{value:.1f}"
    if isinstance(value, float) and column not in ("l", "seconds"):
        return f"{value:.3f}"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, with the types that plots take."""
    lines = []
    for where, line in read_json_lines(folder / METRICS):
        field(where, line, "tokens", int, 0)
        for name in ("fvu", "l0"):
            if name not in line:
                raise ValueError(f"{where}: the field {name!r} is missing")
            field(where, line, name, (float, NoneType))
        lines.append(line)
    return lines
