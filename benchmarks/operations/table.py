"""Rows of races as a table: one line for each operation of each workload."""

from __future__ import annotations

from benchmarks.measure import Row, table

OTHERS = ("torch.topk", "embedding_bag")
HEAD = (
    "(B, d, F, k)",
    "operation",
    "ours, ms",
    "p20–p80",
    "rounds",
    "GB/s (of copy)",
    "TFLOP/s (of product)",
    "eager",
    "torch.compile",
    "another",
    "peak MB, ours / eager",
)


def markdown(rows: list[Row]) -> str:
    """Times of rivals as multiples of ours; a dash where ours failed its check or the rival could not run."""
    lines = []
    for ours in rows:
        if not ours["form"].startswith("ours"):
            continue
        key = [ours[name] for name in ("workload", "dtype", "operation")]
        rivals = {r["form"]: r for r in rows if [r[name] for name in ("workload", "dtype", "operation")] == key}
        size = ", ".join(str(ours[field]) for field in ("B", "d", "F", "k"))
        failed = "" if ours["check"] == "passed" else f" FAILED: {ours['check']}"
        memory = (megabytes(form) for form in (ours, rivals.get("eager", {})))
        lines.append(
            [
                f"({size})",
                ours["operation"] + failed,
                f"{ours['ms']:.3g}",
                f"{ours['p20']:.3g}–{ours['p80']:.3g}",
                str(ours["rounds"]),
                f"{ours['GB/s']:.3g} ({ours['of copy']:.2f})",
                f"{ours['TFLOP/s']:.2g} ({ours['of product']:.2f})",
                *(factor(rivals.get(name, {})) for name in ("eager", "torch.compile")),
                ", ".join(f"{name} {factor(rivals[name])}" for name in OTHERS if name in rivals) or "–",
                " / ".join(memory),
            ]
        )
    return table(HEAD, lines)


def factor(row: Row) -> str:
    value = row.get("ours is faster by")
    return "–" if value is None else f"{value:.2f}x"


def megabytes(row: Row) -> str:
    value = row.get("peak bytes")
    return "–" if value is None else f"{value / 1e6:.0f}"
