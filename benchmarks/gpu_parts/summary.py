"""The rows of each part in a few lines; plain Python, so that the table comes whatever the parts imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PREDICTED = Path(__file__).resolve().parent.parent / "results" / "predicted.json"
RULES = {4.0: "l=4", None: "l=None (BatchTopK)"}
SIZE = ("B", "d", "F", "k")
# the columns that make a line, and what it shows of each workload
SHOWN = {
    "ceilings": (("dtype",), "{product TFLOP/s:.1f} TFLOP/s, copy {copy GB/s:.0f} GB/s"),
    "score": (("operation", "dtype"), "{of product:.2f} of the product's rate{failed}"),
    "kernels": (("operation",), "{ms:.3g} ms ({faster}){failed}"),
    "steps": (("candidate",), "{ratio:.2f}{beside}"),
    "inference": (("candidate", "dtype"), "{ratio:.2f}"),
    "peers": (("candidate",), "{ratio:.2f}"),
}


def with_predictions(rows: list[Row], device: str) -> list[Row]:
    """The rows of steps in bfloat16, each with `predicted`, its multiple of the product by `benchmarks/model.py`, where
    there is one."""
    known = {}
    for row in json.loads(PREDICTED.read_text())["rows"]:
        if row["device"] in device and row["dtype"] == "bfloat16":
            candidate = f"{RULES[row['l']]}, RowAdam {row['adam']}"
            known[(candidate, *(row[name] for name in SIZE))] = row["of_product"]
    keys = [(row.get("candidate"), *(row.get(name) for name in SIZE)) for row in rows]
    return [row | ({"predicted": known[key]} if key in known else {}) for row, key in zip(rows, keys)]


def summary(part: str, rows: list[Row]) -> list[str]:
    if part == "correctness":
        return correctness(rows)
    if part == "tuning":
        return [*tuning(rows), *without_figures(rows)]
    keys, shown = SHOWN[part]
    timed = [row for row in rows if "check" in row or "ratio" in row]
    columns = list(dict.fromkeys(row["workload"] for row in timed))
    lines = [" | ".join(["of the encoder product" if "ratio" in shown else part, *columns])]
    for key, own in by(timed, *keys):
        found = {row["workload"]: shown.format_map({**row, **extra(row)}) for row in reversed(own)}
        peaks = [row["peak_extra_memory"] for row in own if row.get("peak_extra_memory") is not None]
        memory = [f"peak {max(peaks):.2f} [B, F]"] if peaks else []
        lines.append(" | ".join([f"{' '.join(key):32}", *(found.get(name, "-") for name in columns), *memory]))
    bad = [f"{row['operation']}, {row['workload']}: {row['check']}" for row in timed if extra(row)["failed"]]
    return [*lines, *bad[:6], *without_figures([row for row in rows if row not in timed])]


def extra(row: Row) -> dict[str, str]:
    """Of an operation: a mark for a failed check, and how many times faster it is than eager PyTorch; of a step: what
    was predicted."""
    factor = row.get("rivals", {}).get("eager", {}).get("factor")
    failed = "" if row.get("check", "passed") == "passed" else " (!)"
    beside = f" ({row['predicted']:.2f} predicted)" if "predicted" in row else ""
    return {"beside": beside, "failed": failed, "faster": "-" if factor is None else f"{factor:.1f}x"}


def correctness(rows: list[Row]) -> list[str]:
    total = {kind: sum(row[kind] for row in rows) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    counts = ", ".join(f"{n} {kind.lower()}" for kind, n in total.items())
    late = [row["name"] for row in rows if not row["ended"]]
    bad = [f"{row['name']}: {row['failures']}"[:160] for row in rows if row["failures"]]
    return [f"{len(rows)} files: {counts}", *bad[:8], *([f"did not end: {', '.join(late)}"] if late else [])]


def tuning(rows: list[Row]) -> list[str]:
    """The best of each table's row at each size, where it is not the current one."""
    shown, timed = [], [row for row in rows if "ms" in row]
    for key, own in by(timed, "table", "operation", "workload"):
        best = min(own, key=lambda row: row["of current"])
        if best["of current"] < 0.98:
            shown.append(f"{' '.join(key)}: {best['config']} takes {best['of current']:.2f} of the current one's time")
    return [f"{len(timed)} timed; tuning.txt has the lines for configs.py", *shown[:14]]


def without_figures(rows: list[Row]) -> list[str]:
    """A line for each reason, with what it kept from being timed."""
    shown = []
    for (why,), own in by([row for row in rows if "reason" in row], "reason"):
        first = [own[0].get(field) for field in ("name", "candidate", "table", "operation", "dtype", "workload")]
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        shown.append(f"no figures: {' '.join(filter(None, first))}{more}: {why[:160]}")
    return shown[:6]


def by(rows: list[Row], *fields: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    """The rows in groups of the same values of the fields."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return list(groups.items())
