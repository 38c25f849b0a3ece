"""The README's one table of results: a step's time and memory, and what equal time buys, ours beside the peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.measure import table

CANDIDATES = (
    "ours, l=4",
    "ours, l=None (BatchTopK)",
    "ours, TopK",
    "SAELens BatchTopK",
    "dictionary_learning BatchTopK",
    "overcomplete BatchTopK",
    "sparsify TopK",
)
FEATURES = 16384


def markdown_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table and its sources, from `peer_steps.json` and `equal_time.json` as dicts."""
    steps, race = results["peer_steps"], results["equal_time"]
    step = {row["candidate"]: row for row in steps["rows"] if row["F"] == FEATURES}
    end = max(row["seconds"] for row in race["rows"])
    last = {row["candidate"]: row for row in race["rows"] if row["seconds"] == end}
    head = ["", "step, ms", "step / product", "peak extra memory", f"FVU after {end:.0f} s", "loss recovered"]
    made = table(head, [cells(name, step[name], last[name]) for name in CANDIDATES])
    sources = source("Step and memory", steps, step[CANDIDATES[0]]), source("FVU and loss", race, race["setup"])
    return f"{made}\n{' '.join(sources)}\n"


def cells(name: str, step: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    time = (f"{step[key]:{form}}" for key, form in (("step_ms", ".0f"), ("ratio", ".2f"), ("peak_extra_memory", ".2f")))
    return [name, *time, f"{last['fvu']:.3f}", f"{last['loss_recovered']:.3f}"]


def source(what: str, result: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    shape = ", ".join(f"{letter}={size[letter]}" for letter in ("B", "d", "F", "k"))
    return f"{what}: {shape}; {result['device']}, {result['threads']} threads, {result['date']}."
