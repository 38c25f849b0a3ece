"""The page of runs that are to be compared: those of a sweep, or the rows of a study."""

from __future__ import annotations

import csv
import math
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple
from urllib.parse import quote

from ..config import SampledSAEConfig
from ..support.atomic_files import field, read_json
from ..training.sweep_table import COLUMNS, without_seed
from ..training.train_config import TrainConfig
from .html import PAGE, page
from .run_overview import curves

SWEEP = "sweep.json"
SCRIPTS = ("common.js", "charts.js", "runs_table.js", "runs.js")
# what a run was made with, and what is no number to compare
SETTINGS = ("name", "l", "seed")
# what tells runs apart: settings of SAE and training
KINDS = tuple(f.name for kind in (SampledSAEConfig, TrainConfig) for f in fields(kind) if f.name not in SETTINGS)
Row = dict[str, Any]


def is_runs(path: Path) -> bool:
    """Whether a path is a sweep's folder, or a CSV file of runs."""
    return (path / SWEEP).is_file() or (path.suffix == ".csv" and path.is_file())


class Runs(NamedTuple):
    """rows: name, l (None without a pool), seed and what was measured. settings: those that all share."""

    rows: list[Row]
    settings: dict[str, Any]


def read_runs(path: Path) -> Runs:
    """Those of a sweep's folder, or of a CSV file with the columns `name`, `l` and `seed`.

    Raises:
        ValueError: no such rows, or fields of another type; naming file and row.
    """
    file = path / SWEEP if path.is_dir() else path
    sweep = read_json(file) if path.is_dir() else {"rows": _of_csv(file), "train": {}}
    rows = field(file, sweep, "rows", list)
    if not rows:
        raise ValueError(f"{file}: has no runs")
    for i, row in enumerate(rows):
        where = f"{file}: rows[{i}]"
        field(where, row, "name", str)
        field(where, row, "l", (float, NoneType))
        field(where, row, "seed", int, 0)
    return Runs(rows, field(file, sweep, "train", dict))


def runs_page(title: str, found: Runs, folder: Path) -> str:
    """The HTML: any metric against l with mean and spread over seeds, runs to switch on and off, the table.

    Args:
        title: what the runs are of.
        found: the runs.
        folder: where the page will stand; runs with a folder in it get their curves, and a link to their page.
    """
    rows = found.rows
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_metric(name, value)))
    apart = _telling_apart(rows)
    runs = [
        {
            "name": row["name"],
            "series": _series(row, apart),
            "l": row["l"],
            "seed": row["seed"],
            "values": {name: row.get(name) for name in names if _is_metric(name, row.get(name))},
            "curves": curves(folder / row["name"]) if is_member(folder, row) else {},
            "link": _link(folder, row),
            "histogram": _histogram(row),
        }
        for row in rows
    ]
    edges: list[float] = next(
        (row["frequency_edges"] for row in rows if isinstance(row.get("frequency_edges"), list)), []
    )
    ordered = [*(name for name in COLUMNS if name in names), *(name for name in names if name not in COLUMNS)]
    metrics = [[name, COLUMNS.get(name, name.replace("_", " "))] for name in ordered]
    data = {"name": title, "about": found.settings, "metrics": metrics, "runs": runs, "edges": edges}
    return page(title, "runs.html", SCRIPTS, data)


def best(rows: list[Row]) -> Row:
    """The run that recovers most of the loss or, where that was not measured of all, has the lowest FVU.

    Raises:
        ValueError: neither was measured.
    """
    for name, sign in (("loss_recovered_zero", -1), ("fvu", 1)):
        if all(_is_metric(name, row.get(name)) for row in rows):
            return min(rows, key=lambda row: sign * row[name])
    raise ValueError("rows: neither loss_recovered_zero nor fvu was measured of all runs")


def _of_csv(file: Path) -> list[Row]:
    try:
        # spreadsheets begin a file with a byte order mark
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a CSV file ({error})") from None
    for i, row in enumerate(rows):
        if None in row:
            raise ValueError(f"{file}: rows[{i}]: has more cells than the header")
    return [{name: text or None if name == "name" else _value(text) for name, text in row.items()} for row in rows]


def _value(text: Any) -> Any:
    """A number where it is one, None for an empty cell."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text or None


def _is_metric(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and name not in SETTINGS


def _telling_apart(rows: list[Row]) -> list[str]:
    """The settings that are not the same in all runs with a pool, but for l and seed.

    Where these do not tell two runs of one l and seed apart, no mean may be taken over both: the names do.
    """
    pooled = [row for row in rows if row["l"] is not None]
    apart = [name for name in KINDS if len({row.get(name) for row in pooled}) > 1]
    runs = {(*(row.get(name) for name in apart), row["l"], row["seed"]) for row in pooled}
    return apart if len(runs) == len(pooled) else ["name"]


def _series(row: Row, apart: list[str]) -> str:
    """What the runs of all l and seeds have in common; a run without a pool has its name, without the seed."""
    if row["l"] is None or apart == ["name"]:
        return without_seed(row)
    values = {name: row.get(name) for name in apart}
    said = (value if isinstance(value, str) else f"{name}={value}" for name, value in values.items())
    return ", ".join(said) or str(row.get("score") or "runs")


def is_member(folder: Path, row: Row) -> bool:
    """Whether a run has a folder beside the page; a name that leads elsewhere is none."""
    return (
        row["name"] not in (".", "..")
        and "/" not in row["name"]
        and "\\" not in row["name"]
        and (folder / row["name"]).is_dir()
    )


def _link(folder: Path, row: Row) -> str | None:
    there = is_member(folder, row) and (folder / row["name"] / PAGE).is_file()
    return f"./{quote(row['name'])}/{PAGE}" if there else None


def _histogram(row: Row) -> list[int]:
    counts = row.get("frequency_histogram")
    return counts if isinstance(counts, list) and all(isinstance(count, int) for count in counts) else []
