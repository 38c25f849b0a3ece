"""All cases of an architecture compiled, and the table of what came out."""

from __future__ import annotations

import triton

from benchmarks.compiled.calls import Case
from benchmarks.compiled.cases import CASES
from benchmarks.compiled.launch import Launch, launches, resources
from benchmarks.measure import RESULTS

TABLES = RESULTS / "compiled"
COLUMNS = ("registers", "spilled", "shared", "threads", "instructions", "behind products", "matrix", "loads", "stores")
ABOUT = """\
Written by `python -m benchmarks.compiled`. Registers a thread; spilled and shared in bytes; instructions, those
behind the last matrix instruction, matrix instructions, loads from and stores to global memory as they stand
in the code, not as executed."""
Resources = dict[str, int | bool]


def launched(case: Case, arch: str) -> Launch | None:
    """The launch that a case means, None where this architecture has another kernel for its call."""
    found = [one for one in launches(case.call, arch) if one.kernel is case.kernel]
    return found[case.which] if found else None


def compiled(arch: str, only: str | None = None) -> dict[str, Resources]:
    """Resources of each case, by "<kernel file>: <case>"."""
    found: dict[str, Resources] = {}
    for file, cases in CASES.items():
        for name, case in cases.items() if only in (None, file) else ():
            launch = launched(case, arch)
            if launch is not None:
                usage = resources(launch.compile(arch), arch)
                found[f"{file}: {name}"] = {**usage, "wants matrix": launch.wants_matrix(arch)}
    return found


def table(arch: str, found: dict[str, Resources]) -> str:
    lines = [
        f"# {arch}, Triton {triton.__version__}",
        "",
        ABOUT,
        "",
        "| kernel | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, usage in found.items():
        lines.append(f"| {name} | " + " | ".join(str(usage[column]) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
