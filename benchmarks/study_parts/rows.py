"""The rows of the study: one CSV a part, each run a row, all of it on disk as soon as a run is done."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, over_seeds
from sampled_sae.support.atomic_files import write_text

Row = dict[str, Any]
FOLDER = RESULTS / "study"
# What a row is of: the same again replaces it.
KEY = ("name", "seed", "tokens")


class Rows:
    """A CSV file of runs, in the order in which they came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                self.rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]

    def find(self, **key: Any) -> Row | None:
        """The row of a run; None where it has not been run."""
        return next((row for row in self.rows if all(row[name] == key[name] for name in KEY)), None)

    def put(self, row: Row) -> None:
        """Writes a run's row, in place of an earlier one of the same run."""
        key = {name: row[name] for name in KEY}
        before = self.find(**key)
        if before is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(before)] = row
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, text.getvalue())

    def of(self, names: Iterable[str]) -> dict[str, list[Row]]:
        """name -> its rows, one a seed, for the names that have any."""
        found = {name: [row for row in self.rows if row["name"] == name] for name in names}
        return {name: rows for name, rows in found.items() if rows}


def _value(text: str) -> Any:
    """A number where it is one, None for an empty cell."""
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def spread(rows: Iterable[Row], name: str) -> tuple[float, float, float] | None:
    """(mean, least, greatest) of a column over seeds; None where no row has it."""
    return over_seeds(row.get(name) for row in rows)
