"""What a checked run has found, by kernel and line of its source."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = str(Path(__file__).parent)
# frames that are not a kernel's
FOREIGN = ("/triton/", "/numpy/", HERE)
DEEPEST = 4


class Finding(NamedTuple):
    """One fault at one place.

    kind: what is wrong. kernel: the function that was launched. site: the line, and those it was called from, innermost
    first. other: the line of the access that it collides with. note: the argument and the elements.
    """

    kind: str
    kernel: str
    site: str
    other: str = ""
    note: str = ""

    @property
    def suspect(self) -> bool:
        """Whether the code's layout has to be read to judge it (see `shadow.py`)."""
        return self.kind.startswith("same program")

    def __str__(self) -> str:
        return " | ".join(filter(None, self))


class Findings:
    """How many lanes each finding had, in which test it came first, and what was run.

    Attributes:
        lanes: Finding -> lanes. first: Finding -> the test. test: the test that runs now. kernels: launches by kernel.
    """

    def __init__(self) -> None:
        self.lanes: Counter[Finding] = Counter()
        self.first: dict[Finding, str] = {}
        self.test = ""
        self.kernels: Counter[str] = Counter()
        self.programs = self.accesses = 0

    def add(self, finding: Finding, lanes: int = 1) -> None:
        self.lanes[finding] += int(lanes)
        self.first.setdefault(finding, self.test)

    def faults(self, test: str | None = None) -> list[Finding]:
        """What is certainly wrong; of one test, what came first in it."""
        return [f for f in sorted(self.lanes) if not f.suspect and test in (None, self.first[f])]

    def lines(self) -> list[str]:
        """For people: what was run, then each finding."""
        launches = sum(self.kernels.values())
        run = f"{launches} launches of {len(self.kernels)} kernels, {self.programs} programs, {self.accesses} accesses"
        suspects = len(self.lanes) - len(self.faults())
        found = [f"{f} | lanes {n} | first in {self.first[f]}" for f, n in sorted(self.lanes.items())]
        return [f"memcheck: {run}: {len(self.faults())} faults, {suspects} suspects", *(f"  {line}" for line in found)]


def site() -> str:
    """The lines of kernel code that run now, innermost first."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < DEEPEST:
        path = frame.f_code.co_filename
        if not any(part in path for part in FOREIGN):
            lines.append(f"{Path(path).name}:{frame.f_lineno}")
        elif lines:
            break
        frame = frame.f_back
    return " < ".join(lines)
