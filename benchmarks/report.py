"""From the result files to their tables and plots, and to the tables in README.md and docs/*.md.

    python benchmarks/report.py            writes results/*.md, results/plots/*.png and .svg, those of results/study/,
                                           and the pages' tables
    python benchmarks/report.py --check    says which tables and plots are not what the result files say, and exits 1

A page shows a table between `<!-- table: benchmarks/results/NAME.md -->` and `<!-- end -->`.

Each table ends with the device, versions, date and command of its result file; that of the demo is the sweep's own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import equal_time, inference, pages, quality, scale
from benchmarks.measure import RESULTS, ROOT
from benchmarks.operations.race import COLUMNS
from benchmarks.peers import UNDER_AUTOCAST
from benchmarks.record import markdown, table_of, with_caption
from benchmarks.steps.experiments import EXPERIMENTS, table
from benchmarks.study_parts.report import tables as study_tables
from benchmarks.study_parts.rows import FOLDER as STUDY
from sampled_sae.training import sweep_table

DEMO, PLOTS = RESULTS / "demo", RESULTS / "plots"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    **{name: partial(table, name) for name in EXPERIMENTS},
    "cpu_step_epyc": partial(table, "cpu_step"),
    **{name: partial(table, "before_after") for name in ("before_after_layout", "before_after_tidying")},
    "quality": quality.markdown_table,
    "precision": quality.markdown_table,
    "equal_time": equal_time.markdown_table,
    "family_training": equal_time.markdown_table,
    "scale": scale.markdown_table,
    "pages": pages.markdown_table,
    "inference": inference.markdown_table,
    "kernels": table_of(COLUMNS),
}
# the columns of a step in the README's table, and its size
SUMMARY = {"": "{candidate}", "step, ms": "{step_ms:.0f}", "step / encoder product": "{ratio:.2f}"}
SUMMARY |= {"peak extra memory": "{peak_extra_memory:.2f}"}
FEATURES, NOT_SHOWN = 16384, ("sparsify TopK, Adam",)
# comes first: what a config is without l
DEFAULT = "ours, l=None (BatchTopK)"


def results() -> dict[str, dict[str, Any]]:
    """The result files that are there, by name."""
    files = {name: RESULTS / f"{name}.json" for name in TABLES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def tables() -> dict[Path, str]:
    """What each table file has to say."""
    found = results()
    made = {RESULTS / f"{name}.md": with_caption(TABLES[name](result), result) for name, result in found.items()}
    demo = json.loads((DEMO / "sweep.json").read_text())["rows"]
    others = {RESULTS / "summary.md": summary(found), DEMO / "results.md": sweep_table.markdown_table(demo)}
    return {**made, **others, **study_tables()}


def summary(found: dict[str, dict[str, Any]]) -> str:
    """The README's one table: a step's time and memory, and what equal time buys, ours beside the peers.

    Of a peer's training under bfloat16 autocast, time and FVU stand behind.
    """
    step, race = found["peer_steps"], found["equal_time"]
    end = f"{race['setup']['marks'][-1]:g} s"
    last = {row["candidate"]: row for row in race["rows"] if row.get("at") == end}
    here = [row for row in step["rows"] if row["F"] == FEATURES and row["candidate"] in last]
    both = {row["candidate"]: last[row["candidate"]] | row for row in here}
    shown = [name for name in both if name not in NOT_SHOWN and not name.endswith(UNDER_AUTOCAST)]
    rows = [both[name] | {"autocast": both.get(name + UNDER_AUTOCAST)} for name in shown]
    rows.sort(key=lambda row: row["candidate"] != DEFAULT)
    sources = [("Step and memory", rows[0], step), ("FVU", race["rows"][0], race)]
    about = [
        "{}: B={B}, d={d}, F={F}, k={k}; {device}, {threads} threads, {date}.".format(what, **{**size, **result})
        for what, size, result in sources
    ]
    columns = SUMMARY | {f"FVU after {end}": "{fvu:.3f}", "loss recovered": "{loss_recovered:.3f}"}
    columns |= {"bf16 autocast: step, ms": "{autocast[step_ms]:.0f}", "FVU": "{autocast[fvu]:.3f}"}
    return markdown(columns, rows) + "\n" + " ".join(about) + "\n"


def draw(root: Path) -> list[Path]:
    """Writes all plots to their places under `root`; returns their files."""
    from benchmarks.plots import write_plots
    from benchmarks.study_parts.plots import write_plots as write_study_plots

    plots, study = (root / folder.relative_to(ROOT) for folder in (PLOTS, STUDY))
    study.mkdir(parents=True, exist_ok=True)
    return [*write_plots(results(), plots), *write_study_plots(STUDY, study)]


def stale_plots() -> list[Path]:
    """The plots whose SVG is not what the result files give."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(new, ROOT / new.relative_to(folder)) for new in draw(Path(folder)) if new.suffix == ".svg"]
        return [old for new, old in pairs if not old.is_file() or old.read_bytes() != new.read_bytes()]


def with_tables(page: str, made: dict[Path, str]) -> str:
    """The page with the tables of today; those of other files than `made` as the files are."""

    def place(match: re.Match[str]) -> str:
        file = ROOT / match[2]
        return match[1] + (made[file] if file in made else file.read_text(encoding="utf-8")).strip() + "\n" + match[4]

    return PLACE.sub(place, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs")
    args = parser.parse_args()
    made = tables()
    shown = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    files = {**made, **{page: with_tables(page.read_text(encoding="utf-8"), made) for page in sorted(shown)}}
    stale = [file for file, text in files.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if args.check:
        stale += stale_plots()
        for file in stale:
            print("differs:", file.relative_to(ROOT))
        return 1 if stale else 0
    for file in stale:
        file.write_text(files[file], encoding="utf-8")
    for file in [*stale, *draw(ROOT)]:
        print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
