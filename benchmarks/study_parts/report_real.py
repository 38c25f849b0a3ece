"""Tables of the runs on real activations: means over seeds, with half their range behind."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study_parts.rows import Rows
from benchmarks.study_parts.tables import Columns, cell, line, made_on, markdown
from benchmarks.study_parts.variants import BATCH_RULES, DEAD_RULES, DENSE, PARTS, REAL, TIME_RULES, Variant

QUALITY: Columns = {
    "FVU": ("{mode}_fvu|fvu", 3),
    "loss recovered": ("loss_recovered_zero", 3),
    "L0": ("{mode}_l0|l0", 1),
    "never active": ("dead_share", 3),
}
SHARED: Columns = {
    "features for 90%": ("{mode}_features_for_90|features_for_90", 0),
    "Jaccard of batches": ("{mode}_jaccard|jaccard", 3),
    "Jaccard of topics": ("{mode}_topics_jaccard", 3),
    "explained by a batch's first 4k": ("{mode}_first_share", 3),
    "rare: entries": ("{mode}_rare_entries", 3),
    "rare: size": ("{mode}_rare_size", 2),
}
PROBES: Columns = {f"{k}": (f"{{mode}}_probe_{k}", 3) for k in (1, 2, 5, 20)}
TASKS: Columns = {name: (f"{{mode}}_probe_{name}_5", 3) for name in ("topic", "sentiment", "language", "speech")}
PAIRS: Columns = {"cosine": ("cosine", 3), "shared": ("shared", 3), "entries": ("shared_entries", 3)}
ALIVE: Columns = {"cosine of encoder and decoder": ("alignment", 3), "γ left": ("gamma_left", 2)}
PROBED: Columns = {**QUALITY, "probe of 5": ("{mode}_probe_5", 3)}
# part -> its columns, the rules of which it has variants, what those are called beside them
PLAIN: dict[str, tuple[Columns, tuple[Variant, ...], str]] = {
    "batches": ({**PROBED, "features for 90%": SHARED["features for 90%"]}, BATCH_RULES, "{name}-b{batch_size}"),
    "dead": ({**PROBED, **ALIVE}, DEAD_RULES, "{name}"),
    "time": ({**PROBED, "CPU seconds": ("cpu_seconds", 0)}, TIME_RULES, "{name}"),
}
OTHERS = ("pairs", *PLAIN)
# in the table that shows all at a glance
GLANCE = ("batchtopk", "topk", "matryoshka", *(f"top-l2-l{l}" for l in (64, 16, 4, 1)))
GLANCE += tuple(f"sample-l2-l{l}" for l in (96, 64, 16))
MODES = {"threshold": "threshold", "pool": "pool, of a batch's size", "batch": "batch"}


def of_rules(folder: Path) -> list[Path]:
    """The files of rows that tell rules apart, one a model; not one that only has what parts are read beside."""
    beside = {variant.name for _, rules, _ in PLAIN.values() for variant in rules}
    paths = [path for path in sorted(folder.glob("real_*.csv")) if path.stem.rsplit("_", 1)[-1] not in OTHERS]
    return [path for path in paths if any(row["name"] not in beside for row in Rows(path).rows)]


def tables(folder: Path) -> dict[Path, str]:
    """file.md -> its text."""
    made = {}
    for path in of_rules(folder):
        rows, pairs = Rows(path), Rows(path.with_name(f"{path.stem}_pairs.csv"))
        made[path.with_suffix(".md")] = _quality(rows)
        made[path.with_name(f"{path.stem}_glance.md")] = _glance(rows)
        made[path.with_name(f"{path.stem}_shared.md")] = _shared(rows, pairs)
        made[path.with_name(f"{path.stem}_inference.md")] = _inferences(rows)
    for part in PLAIN:
        for path in sorted(folder.glob(f"real_*_{part}.csv")):
            rules = path.with_name(f"{path.stem.removesuffix(f'_{part}')}.csv")
            made[path.with_suffix(".md")] = _part(part, Rows(path), Rows(rules))
    return made


def _quality(rows: Rows) -> str:
    """Reconstruction, use of the dictionary and probes."""
    probes = {f"probe of {name}": column for name, column in PROBES.items()}
    tasks = {f"{name}, 5": column for name, column in TASKS.items()}
    columns = _measured({**QUALITY, **probes, **tasks}, rows)
    lines = []
    for name, of in rows.of(REAL).items():
        if name == DENSE:
            dense = {f"{task}, 5": cell(of, f"probe_{task}", 3) for task in TASKS}
            dense["probe of 20"] = cell(of, "probe", 3)
            lines.append([f"{name}, all dimensions", "", *(dense.get(heading, "") for heading in columns)])
        else:
            lines.append(line(name, of, columns))
    return f"{markdown(['SAE', 'seeds', *columns], lines)}\n{made_on(rows.rows)}\n"


def _glance(rows: Rows) -> str:
    """What l does, measure by measure; an SAE a column."""
    found = rows.of(GLANCE)
    measures = {**QUALITY, **SHARED, "probe of 1, mean of tasks": PROBES["1"], "probe of 5, mean of tasks": PROBES["5"]}
    measures |= {f"probe of 5, {name}": column for name, column in TASKS.items()}
    measures = _measured(measures, rows)
    columns = [line(name, of, measures)[2:] for name, of in found.items()]
    lines = [[heading, *cells] for heading, *cells in zip(measures, *columns)]
    return f"{markdown(['', *(_in_words(name) for name in found)], lines)}\n{made_on(rows.rows)}\n"


def _in_words(name: str) -> str:
    pool, _, l = name.partition("-l2-l")
    return f"{'drawn' if pool == 'sample' else pool}, l={l}" if l else name


def _shared(rows: Rows, pairs: Rows) -> str:
    """Shared structure, the lottery, and what another seed finds."""
    agreement = {f"seeds: {heading}": column for heading, column in PAIRS.items()}
    columns, lines = _measured(SHARED, rows), []
    for name, of in rows.of(name for name in REAL if name != DENSE).items():
        two = [pair for pair in pairs.rows if pair["name"] == name and pair["tokens"] == of[0]["tokens"]]
        lines.append([*line(name, of, columns), *(cell(two, column, digits) for column, digits in agreement.values())])
    return f"{markdown(['SAE', 'seeds', *columns, *agreement], lines)}\n{made_on(rows.rows)}\n"


def _inferences(rows: Rows) -> str:
    """FVU by every inference, and the probe of five features by two; a TopK SAE has one inference."""
    columns: Columns = {f"FVU: {heading}": (f"{mode}_fvu", 3) for mode, heading in MODES.items()}
    columns |= {f"probe of 5: {mode}": (f"{mode}_probe_5", 3) for mode in ("threshold", "batch")}
    columns = _measured(columns, rows)
    found = rows.of(name for name in REAL if name != DENSE)
    lines = [line(name, of, columns) for name, of in found.items() if of[0]["threshold_fvu"] is not None]
    return f"{markdown(['SAE', 'seeds', *columns], lines)}\n{made_on(rows.rows)}\n"


def _part(part: str, rows: Rows, rules: Rows) -> str:
    """Each rule as the study trains it, then what the part has made of it, in ascending order of the batch."""
    columns, bases, called = PLAIN[part]
    columns = _measured(columns, rows)
    lines, used = [], list(rows.rows)
    for base in bases:
        as_it_is = rules.of([base.name])
        used += as_it_is.get(base.name, [])
        found = {called.format(name=name, batch_size=of[0]["batch_size"]): of for name, of in as_it_is.items()}
        # the name of one rule may begin that of another
        found |= rows.of(name for name, variant in PARTS[part].items() if variant.of == base.name)
        of_rule = sorted(found.items(), key=lambda entry: entry[1][0]["batch_size"])
        lines += [line(name, of, columns) for name, of in of_rule]
    return f"{markdown(['SAE', 'seeds', *columns], lines)}\n{made_on(used)}\n"


def _measured(columns: Columns, rows: Rows) -> Columns:
    """Those that some row has: without labelled texts there are no probes."""
    there = {name for row in rows.rows for name, value in row.items() if value is not None}

    def is_there(column: str) -> bool:
        return any(name in there for mode in ("threshold", "token") for name in column.format(mode=mode).split("|"))

    return {heading: column for heading, column in columns.items() if is_there(column[0])}
