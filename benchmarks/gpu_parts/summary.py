"""The rows of each part in a few lines; plain Python, so that the table comes whatever the parts imported."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def summary(part: str, rows: list[Row]) -> list[str]:
    whole = {"correctness": correctness, "tuning": tuning, "steps": steps, "peers": steps}
    if part in whole:
        return whole[part](rows)
    shown = {"ceilings": ceilings, "score": score, "kernels": kernels}[part]
    return shown([row for row in rows if "ms" in row]) + without_figures(rows)


def correctness(rows: list[Row]) -> list[str]:
    total = {kind: sum(row[kind] for row in rows) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    counts = ", ".join(f"{n} {kind.lower()}" for kind, n in total.items())
    late = [row["name"] for row in rows if not row["ended"]]
    bad = [f"{row['name']}: {row['failures']}"[:160] for row in rows if row["failures"]]
    return [f"{len(rows)} files: {counts}", *bad[:8], *([f"did not end: {', '.join(late)}"] if late else [])]


def ceilings(rows: list[Row]) -> list[str]:
    shown = [f"copy {max(row['copy GB/s'] for row in rows):.0f} GB/s"] if rows else []
    for name, own in by(rows, "workload"):
        shown.append(f"{name}: product in TFLOP/s: " + ", ".join(f"{r['dtype']} {r['TFLOP/s']:.1f}" for r in own))
    return shown


def score(rows: list[Row]) -> list[str]:
    """A line for each width and dtype: times as multiples of cuBLAS's product."""
    return [
        f"{width} {dtype}: " + ", ".join(f"{r['operation']} {1 / r['of product']:.2f}{failed(r)}" for r in own)
        for (width, dtype), own in by(rows, "workload", "dtype")
    ]


def kernels(rows: list[Row]) -> list[str]:
    """A line for each operation: ours in ms and, in brackets, how many times faster than eager PyTorch."""
    columns = names(rows)
    shown = ["ours in ms (times faster than eager; ! check failed): " + ", ".join(columns)]
    for operation, of_operation in by(rows, "operation"):
        cells = []
        for column in columns:
            own = [row for row in of_operation if row["workload"] == column]
            ours = next((row for row in own if row["form"].startswith("ours")), None)
            eager = next((row.get("ours is faster by") for row in own if row["form"] == "eager"), None)
            factor = "-" if eager is None else f"{eager:.1f}x"
            cells.append("-" if ours is None else f"{ours['ms']:.3g} ({failed(ours) or factor})")
        shown.append(f"{operation:32} {'  '.join(f'{cell:16}' for cell in cells).rstrip()}")
    bad = [row for row in rows if failed(row) and row["form"].startswith("ours")]
    return shown + [f"{row['operation']}, {row['workload']}: {row['check']}" for row in bad[:6]]


def steps(rows: list[Row]) -> list[str]:
    """A line for each step: multiples of the product at each workload, and the largest peak memory."""
    columns = names(rows)
    shown = ["multiples of the encoder product: " + ", ".join(columns)]
    for step, of_step in by([{"candidate": row.get("name"), **row} for row in rows], "candidate"):
        own = {row.get("workload"): row for row in of_step}
        cells = [f"{own[c]['ratio']:.2f}" if "ratio" in own.get(c, {}) else "-" for c in columns]
        peaks = [row["peak_extra_memory"] for row in of_step if row.get("peak_extra_memory") is not None]
        reasons = list(dict.fromkeys(row["reason"][:60] for row in of_step if row.get("reason")))
        peak = f"peak {max(peaks):.2f} [B, F]" if peaks else ""
        shown.append(f"{step:36} {'  '.join(f'{cell:6}' for cell in cells)} {peak} {'; '.join(reasons)}".rstrip())
    return shown


def tuning(rows: list[Row]) -> list[str]:
    """The best of each table's row at each size, where it is not the current one."""
    shown, tried = [], [row for row in rows if "ms" in row]
    for key, own in by(tried, "table", "operation", "workload"):
        best = min(own, key=lambda row: row["of current"])
        if best["of current"] < 0.98:
            shown.append(f"{' '.join(key)}: {best['config']} takes {best['of current']:.2f} of the current one's time")
    wrong = sum("reason" in row for row in rows)
    return [f"{len(tried)} timed, {wrong} left out or refused; tuning.txt has the lines for configs.py", *shown[:14]]


def without_figures(rows: list[Row]) -> list[str]:
    """A line for each reason, with what it kept from being timed."""
    shown = []
    for why, own in by([row for row in rows if "ms" not in row], "reason"):
        first = [own[0].get(field) for field in ("name", "operation", "form", "dtype", "workload")]
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        shown.append(f"no figures: {' '.join(filter(None, first))}{more}: {why[:160]}")
    return shown[:6]


def failed(row: Row) -> str:
    return "" if row["check"] == "passed" else "!"


def by(rows: list[Row], *fields: str) -> list[tuple[Any, list[Row]]]:
    """The rows in groups of one value of the field, or of one tuple of those of several."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[field] for field in fields)
        groups.setdefault(key if len(key) > 1 else key[0], []).append(row)
    return list(groups.items())


def names(rows: list[Row]) -> list[str]:
    """The workloads in the rows, in order."""
    return list(dict.fromkeys(row["workload"] for row in rows if "workload" in row))
