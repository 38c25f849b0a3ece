"""What `benchmarks/model.py` predicted, beside what was measured; plain Python, as the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "results" / "predicted.json"
RULES = {4.0: "l=4", None: "l=None (BatchTopK)"}
SIZE = ("B", "d", "F", "k")


def with_predictions(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The rows of steps in bfloat16, each with `predicted`, its multiple of the product, where there is one."""
    known = {}
    for row in json.loads(FILE.read_text())["rows"]:
        if row["device"] in device and row["dtype"] == "bfloat16":
            candidate = f"{RULES[row['l']]}, RowAdam {row['adam']}"
            known[(candidate, *(row[name] for name in SIZE))] = row["of_product"]
    keys = [(row.get("candidate"), *(row.get(name) for name in SIZE)) for row in rows]
    return [row | ({"predicted": known[key]} if key in known else {}) for row, key in zip(rows, keys)]
