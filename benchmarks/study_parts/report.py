"""Tables and plots of the study's rows: means over seeds, with half their range behind."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study_parts import report_real
from benchmarks.study_parts.rows import FOLDER, Row, Rows
from benchmarks.study_parts.tables import Columns, cell, line, made_on, markdown
from benchmarks.study_parts.variants import SYNTHETIC
from sampled_sae.support.atomic_files import write_text

MEASURED: Columns = {"MCC": ("mcc", 3), "uniqueness": ("uniqueness", 3)}
MEASURED |= {"F1": ("{mode}_f1", 3), "precision": ("{mode}_precision", 3), "recall": ("{mode}_recall", 3)}
MEASURED |= {"found": ("{mode}_found", 0), "R2": ("{mode}_r2", 3), "L0": ("{mode}_l0", 2), "dead": ("{mode}_dead", 0)}
MEASURED |= {"absorbed": ("{mode}_absorbed", 3), "of parents": ("{mode}_parents", 0)}
SPELT: Columns = {"first letters named": ("right", 3), "by the most frequent letter": ("by_chance", 3)}
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
    lines = [line(name, of, MEASURED) for name, of in found.items()]
    by = ["SAE", *(f"{heading}: F1 / R2" for heading in INFERENCES.values()), "best size"]
    others = [[name, *_pairs(of)] for name, of in found.items() if of[0]["threshold_f1"] is not None]
    return f"{markdown(['SAE', 'seeds', *MEASURED], lines)}\n{markdown(by, others)}\n{made_on(rows.rows)}\n"


def spelling_table(rows: Rows) -> str:
    """The share of words whose first letter a model names, a model a line."""
    found = rows.of(dict.fromkeys(row["name"] for row in rows.rows))
    lines = [line(name, of, SPELT) for name, of in found.items()]
    return f"{markdown(['model', 'seeds', *SPELT], lines)}\n{made_on(rows.rows)}\n"


def write_report(folder: Path = FOLDER) -> list[Path]:
    """Writes tables and plots; returns their paths."""
    from benchmarks.study_parts.plots import write_plots

    made = tables(folder)
    for path, text in made.items():
        write_text(path, text)
    return [*made, *write_plots(folder, folder)]


def _pairs(rows: list[Row]) -> list[str]:
    sizes = sorted({row["chosen_features"] for row in rows})
    pairs = [f"{cell(rows, f'{mode}_f1', 3)} / {cell(rows, f'{mode}_r2', 3)}" for mode in INFERENCES]
    return [*pairs, ", ".join(map(str, sizes))]
