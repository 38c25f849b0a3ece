"""All cases of an architecture compiled, and the table of what came out."""

from __future__ import annotations

import importlib
from pathlib import Path

import triton

from .case import resources

CASES = Path(__file__).parent / "cases"
RESULTS = Path(__file__).parents[1] / "results" / "compiled"
COLUMNS = ("registers", "spilled", "shared", "threads", "instructions", "matrix", "loads", "stores")


def compiled(arch: str, only: str | None = None) -> dict[str, dict[str, int | bool]]:
    """Resources of each case, by "<kernel file>: <case>"."""
    found: dict[str, dict[str, int | bool]] = {}
    for path in sorted(CASES.glob("*.py")):
        if only is None or path.stem == only:
            module = importlib.import_module(f"benchmarks.compiled.cases.{path.stem}")
            for name, case in module.cases(arch).items():
                found[f"{path.stem}: {name}"] = {**resources(case.compile(arch), arch), "wants matrix": case.matrix}
    return found


def table(arch: str, found: dict[str, dict[str, int | bool]]) -> str:
    lines = [
        f"# {arch}, Triton {triton.__version__}",
        "",
        "Written by `python -m benchmarks.compiled`. Registers a thread; spilled and shared in bytes; instructions,",
        "matrix instructions, loads from and stores to global memory as they stand in the code, not as executed.",
        "",
        "| kernel | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, usage in found.items():
        lines.append(f"| {name} | " + " | ".join(str(usage[column]) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
