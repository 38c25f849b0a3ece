"""Rows of races as a table: one line for each operation of each workload."""

from __future__ import annotations

from benchmarks.measure import Row
from benchmarks.record import SIZE, markdown

OTHERS = ("torch.topk", "embedding_bag")
COLUMNS = {
    **SIZE,
    "operation": "{operation}{failed}",
    "ours, ms": "{ms:.3g}",
    "p20–p80": "{p20:.3g}–{p80:.3g}",
    "rounds": "{rounds}",
    "GB/s (of copy)": "{GB/s:.3g} ({of copy:.2f})",
    "TFLOP/s (of product)": "{TFLOP/s:.2g} ({of product:.2f})",
    "eager": "{factors[eager]:.2f}x",
    "torch.compile": "{factors[torch.compile]:.2f}x",
    "another": "{another}",
    "peak MB, ours / eager": "{memory}",
}


def table(rows: list[Row]) -> str:
    """Times of rivals as multiples of ours; a dash where ours failed its check or the rival could not run."""
    lines = []
    for ours in rows:
        if not ours.get("form", "").startswith("ours"):
            continue
        same = [r for r in rows if all(r.get(name) == ours[name] for name in ("workload", "dtype", "operation"))]
        forms = {r["form"]: r for r in same}
        factors = {name: row["ours is faster by"] for name, row in forms.items() if row.get("ours is faster by")}
        others = [
            f"{name} {factors[name]:.2f}x" if name in factors else f"{name} –" for name in forms if name in OTHERS
        ]
        memory = (row.get("peak bytes") for row in (ours, forms.get("eager", {})))
        more = {
            "failed": "" if ours["check"] == "passed" else f" FAILED: {ours['check']}",
            "factors": factors,
            "another": ", ".join(others) or "–",
            "memory": " / ".join("–" if value is None else f"{value / 1e6:.0f}" for value in memory),
        }
        lines.append({**ours, **more})
    return markdown(COLUMNS, lines)
