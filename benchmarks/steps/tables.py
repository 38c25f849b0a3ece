"""Rows of steps as markdown, and the exponents that are fitted through those along an axis."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Row, table
from benchmarks.steps.experiments import EXPERIMENTS

FITTED = {"step_ms": "step", "floor_ms": "floor", "peak_bytes": "memory"}


def markdown_table(name: str, result: dict[str, Any]) -> str:
    """The rows of an experiment; where one has no figures, the reason."""
    columns = EXPERIMENTS[name].columns
    lines = []
    for row in result["rows"]:
        line = [cell(row, field) for field in columns.values()]
        if "reason" in row:
            named = [i for i, field in enumerate(columns.values()) if field in ("size", "candidate")]
            first = named[-1] + 1
            line[first:] = [f"– ({row['reason']})", *[""] * (len(line) - first - 1)]
        lines.append(line)
    whole = table(list(columns), lines)
    return f"{exponents_table(result['rows'])}\n{whole}" if name == "scaling" else whole


def cell(row: Row, field: str) -> str:
    if field == "size":
        return "({B}, {d}, {F}, {k})".format(**row)
    value = row.get(field.removesuffix(" spread"))
    if value is None:
        return "–"
    if field.endswith(" spread"):
        least, most = (row[f"{field.removesuffix(' spread')}_{p}"] for p in ("p20", "p80"))
        return f"{least:.2f}–{most:.2f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if field.endswith("_ms") else f"{value:.2f}"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of ln(values) against ln(sizes) by least squares; None for one point, or where a value is not positive."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def exponents_table(rows: Sequence[Row]) -> str:
    """For each axis and rule the exponents of step, floor and memory."""
    lines = []
    timed = [row for row in rows if "reason" not in row]
    for axis, rule in dict.fromkeys((row["workload"], row["candidate"]) for row in timed):
        same = [row for row in timed if (row["workload"], row["candidate"]) == (axis, rule)]
        sizes = [row["value"] for row in same]
        slopes = [exponent(sizes, [row[measure] or 0 for row in same]) for measure in FITTED]
        shown = ["–" if slope is None else f"{slope:.2f}" for slope in slopes]
        lines.append([axis, f"{min(sizes)} to {max(sizes)}", rule, *shown])
    return table(["axis", "range", "rule", *(f"exponent of {name}" for name in FITTED.values())], lines)
