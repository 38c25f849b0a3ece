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
    shown = [f"copy {row['GB/s']:.0f} GB/s" for row in rows if row["name"] == "copy"]
    for name in names(rows, "name", "product"):
        rates = [f"{row['dtype']} {row['TFLOP/s']:.1f}" for row in rows if workload(row) == name]
        shown.append(f"{name}: product in TFLOP/s: {', '.join(rates)}")
    return shown


def score(rows: list[Row]) -> list[str]:
    """A line for each width and dtype: times as multiples of cuBLAS's product."""
    shown = []
    for key in dict.fromkeys((workload(row), row["dtype"]) for row in rows):
        own = [row for row in rows if (workload(row), row["dtype"]) == key and row["name"] != "cuBLAS product"]
        figures = ", ".join(f"{row['name']} {row['of product']:.2f}" for row in own)
        shown.append(f"{' '.join(key)}: {figures}")
    return shown


def kernels(rows: list[Row]) -> list[str]:
    """A line for each operation: ours in ms and, in brackets, how many times faster than eager PyTorch."""
    columns = names(rows)
    shown = ["ours in ms (times faster than eager; ! check failed): " + ", ".join(columns)]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        cells = []
        for column in columns:
            own = [row for row in rows if row["operation"] == operation and workload(row) == column]
            ours = next((row for row in own if row["form"].startswith("ours")), None)
            eager = next((row.get("ours is faster by") for row in own if row["form"] == "eager"), None)
            if ours is None:
                cells.append("-")
            else:
                factor = "!" if ours["check"] != "passed" else "-" if eager is None else f"{eager:.1f}x"
                cells.append(f"{ours['ms']:.3g} ({factor})")
        shown.append(f"{operation:32} {'  '.join(f'{cell:16}' for cell in cells).rstrip()}")
    bad = [f"{row['operation']}, {workload(row)}: {row['check']}" for row in rows if failed_check(row)]
    return shown + bad[:6]


def steps(rows: list[Row]) -> list[str]:
    """A line for each step: multiples of the product at each workload, and the largest peak memory."""
    columns = names(rows)
    shown = ["multiples of the encoder product: " + ", ".join(columns)]
    for step in dict.fromkeys(row["name"] for row in rows):
        own = {workload(row): row for row in rows if row["name"] == step}
        cells = [f"{own[c]['of product']:.2f}" if "of product" in own.get(c, {}) else "-" for c in columns]
        peaks = [row["peak of [B, F]"] for row in own.values() if row.get("peak of [B, F]") is not None]
        notes = list(dict.fromkeys(row["note"][:60] for row in own.values() if row.get("note")))
        peak = f"peak {max(peaks):.2f} [B, F]" if peaks else ""
        shown.append(f"{step:36} {'  '.join(f'{cell:6}' for cell in cells)} {peak} {'; '.join(notes)}".rstrip())
    return shown


def tuning(rows: list[Row]) -> list[str]:
    """The best of each table's row at each size, where it is not the current one."""
    shown, tried = [], [row for row in rows if "ms" in row]
    for key in dict.fromkeys((row["table"], row["key"], workload(row)) for row in tried):
        own = [row for row in tried if (row["table"], row["key"], workload(row)) == key]
        best = min(own, key=lambda row: row["of current"])
        if best["of current"] < 0.98:
            shown.append(f"{' '.join(key)}: {best['config']} takes {best['of current']:.2f} of the current one's time")
    wrong = sum("note" in row for row in rows)
    return [f"{len(tried)} timed, {wrong} left out or refused; tuning.txt has the lines for configs.py", *shown[:14]]


def without_figures(rows: list[Row]) -> list[str]:
    """A line for each reason, with what it kept from being timed."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "ms" not in row:
            which = (row.get("name") or row["operation"], row.get("form", ""), row.get("dtype", ""), workload(row))
            reasons.setdefault(row.get("note") or row["left out"], []).append(" ".join(filter(None, which)))
    shown = [f"no figures: {which[0]}{more(len(which) - 1)}: {why[:160]}" for why, which in reasons.items()]
    return shown[:6]


def more(n: int) -> str:
    return f" and {n} more" if n else ""


def failed_check(row: Row) -> bool:
    return row["form"].startswith("ours") and row["check"] != "passed"


def workload(row: Row) -> str:
    return str(row.get("workload", ""))


def names(rows: list[Row], field: str | None = None, value: str | None = None) -> list[str]:
    """The workloads in the rows, in order; only of rows whose `field` is `value`, if one is given."""
    found = (workload(row) for row in rows if field is None or row[field] == value)
    return [name for name in dict.fromkeys(found) if name]
