"""Tables and plots of the study's rows: means over seeds, with half their range behind."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study_parts import report_real
from benchmarks.study_parts.rows import FOLDER, Row, Rows
from benchmarks.study_parts.tables import cell, made_on, markdown
from benchmarks.study_parts.variants import SYNTHETIC
from sampled_sae.support.atomic_files import write_text

# heading -> column of the rows, the part behind an inference
DECODER = {"MCC": "mcc", "uniqueness": "uniqueness"}
CODES = {"F1": "f1", "precision": "precision", "recall": "recall", "found": "found", "R2": "r2", "L0": "l0"}
CODES |= {"dead": "dead", "absorbed": "absorbed", "of parents": "parents"}
INFERENCES = {
    "threshold": "threshold",
    "pool": "pool, of a batch's size",
    "chosen": "pool, best size",
    "batch": "batch",
}


def tables(folder: Path = FOLDER) -> dict[Path, str]:
    """file.md -> its text, for each file of rows."""
    known = {path.with_suffix(".md"): table(Rows(path)) for path in sorted(folder.glob("synthetic_*.csv"))}
    spelt = {path.with_suffix(".md"): spelling_table(Rows(path)) for path in folder.glob("spelling.csv")}
    return {**known, **report_real.tables(folder), **spelt}


def table(rows: Rows) -> str:
    """One table of decoders and codes by a threshold, one of F1 and R2 by every inference, and how they were made."""
    found = rows.of(SYNTHETIC)
    head = ["SAE", "seeds", *DECODER, *CODES]
    lines = [[name, str(len(of)), *_cells(of, _first(of))] for name, of in found.items()]
    by = ["SAE", *(f"{heading}: F1 / R2" for heading in INFERENCES.values()), "best size"]
    others = [[name, *_pairs(of)] for name, of in found.items() if of[0]["threshold_f1"] is not None]
    return f"{markdown(head, lines)}\n{markdown(by, others)}\n{made_on(rows.rows)}\n"


def spelling_table(rows: Rows) -> str:
    """The share of words whose first letter a model names, a model a line."""
    found = rows.of(dict.fromkeys(row["name"] for row in rows.rows))
    lines = [[name, str(len(of)), cell(of, "right", 3), cell(of, "by_chance", 3)] for name, of in found.items()]
    head = ["model", "seeds", "first letters named", "by the most frequent letter"]
    return f"{markdown(head, lines)}\n{made_on(rows.rows)}\n"


def write_report(folder: Path = FOLDER) -> list[Path]:
    """Writes tables and plots; returns their paths."""
    from benchmarks.study_parts.plots import write_plots

    made = tables(folder)
    for path, text in made.items():
        write_text(path, text)
    return [*made, *write_plots(folder, folder)]


def _first(rows: list[Row]) -> str:
    """The inference of the first table: a TopK SAE keeps k of each token."""
    return "threshold" if rows[0]["threshold_f1"] is not None else "token"


def _cells(rows: list[Row], mode: str) -> list[str]:
    columns = [*DECODER.values(), *(f"{mode}_{name}" for name in CODES.values())]
    return [_cell(rows, column) for column in columns]


def _pairs(rows: list[Row]) -> list[str]:
    sizes = sorted({row["chosen_features"] for row in rows})
    pairs = [f"{_cell(rows, f'{mode}_f1')} / {_cell(rows, f'{mode}_r2')}" for mode in INFERENCES]
    return [*pairs, ", ".join(map(str, sizes))]


def _cell(rows: list[Row], column: str) -> str:
    return cell(rows, column, 0 if column.endswith(("dead", "found", "parents")) else 2 if column.endswith("l0") else 3)
