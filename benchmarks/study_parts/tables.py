"""Cells and tables in Markdown, of rows over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study_parts.rows import Row, spread

# heading -> (column of the rows, digits); {mode} is how the SAE selects: a threshold, or by token for TopK; behind | is
# what stands in for a column that no row has
Columns = dict[str, tuple[str, int]]


def cell(rows: list[Row], column: str, digits: int) -> str:
    """Mean and half the range of a column; "–" where no row has it."""
    found = spread(rows, column)
    if found is None:
        return "–"
    mean, least, greatest = found
    half = f" ±{(greatest - least) / 2:.{digits}f}" if len(rows) > 1 else ""
    return f"{mean:.{digits}f}{half}"


def line(name: str, of: list[Row], columns: Columns) -> list[str]:
    """Name, seeds and columns of the rows of an SAE."""
    by_threshold = any(of[0].get(f"threshold_{measure}") is not None for measure in ("fvu", "f1"))
    cells = []
    for column, digits in columns.values():
        first, _, other = column.format(mode="threshold" if by_threshold else "token").partition("|")
        there = any(row.get(first) is not None for row in of)
        cells.append(cell(of, first if there else other or first, digits))
    return [name, str(len(of)), *cells]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *lines))


def made_on(rows: list[Row]) -> str:
    """On what, with what and when; of several machines or days all."""
    names = ("d_sae", "k", "tokens", "lr", "batch_size", "device", "date")
    kinds = {name: sorted({_text(row[name]) for row in rows if row.get(name) is not None}) for name in names}
    listed = "; ".join(f"{name} {', '.join(values)}" for name, values in kinds.items() if values)
    return f"Means over seeds, ± half their range. {listed}. The command of each row stands in the CSV."


def _text(value: object) -> str:
    # 16 and 16.0 are one k
    return f"{value:g}" if isinstance(value, float) else str(value)
