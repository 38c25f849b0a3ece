"""All cases of an architecture compiled, and the table of what came out."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator

import triton

from benchmarks.compiled.cases import CASES, Case
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


def launches_of(arch: str, only: str | None = None) -> Iterator[tuple[str, Launch]]:
    """That of each case, behind "<kernel file>: <case>"."""
    for file, cases in CASES.items():
        for name, case in cases.items() if only in (None, file) else ():
            launch = launched(case, arch)
            if launch is not None:
                yield f"{file}: {name}", launch


def compiled(arch: str, only: str | None = None) -> dict[str, Resources]:
    return {
        name: {**resources(launch.compile(arch), arch), "wants matrix": launch.wants_matrix(arch)}
        for name, launch in launches_of(arch, only)
    }


def digest(arch: str) -> str:
    """Of all that the compiler is given: of one Triton, equal digests mean equal code."""
    given = "".join(f"{name}: {launch.program(arch)}" for name, launch in launches_of(arch))
    return hashlib.sha256(given.encode()).hexdigest()[:32]


@functools.cache
def committed(arch: str) -> dict[str, dict[str, int]]:
    """The rows of the table in the tree, by name."""
    rows = re.findall(r"^\| (\w+: .*?) \|(.*)\|$", (TABLES / f"{arch}.md").read_text(), re.MULTILINE)
    return {name: dict(zip(COLUMNS, map(int, cells.split("|")))) for name, cells in rows}


def known(arch: str) -> dict[str, Resources]:
    """What `compiled` gives: from the table in the tree where it was made of what the compiler is given today."""
    text = (TABLES / f"{arch}.md").read_text()
    if not text.startswith(title(arch)) or digest(arch) not in text:
        print(f"{arch}: the table is of other programs or Triton (python -m benchmarks.compiled renews it)")
        return compiled(arch)
    rows = committed(arch)
    return {name: {**rows[name], "wants matrix": launch.wants_matrix(arch)} for name, launch in launches_of(arch)}


def title(arch: str) -> str:
    return f"# {arch}, Triton {triton.__version__}\n"


def table(arch: str, found: dict[str, Resources]) -> str:
    lines = [
        title(arch),
        f"{ABOUT} Of programs with the digest {digest(arch)}.",
        "",
        "| kernel | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, usage in found.items():
        lines.append(f"| {name} | " + " | ".join(str(usage[column]) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
