"""What a checked run has found, by kernel and line of its source."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import triton

# frames that are not a kernel's: of these packages, not of folders of their names
FOREIGN = tuple(
    os.path.join(os.path.dirname(os.path.abspath(file)), "") for file in (triton.__file__, numpy.__file__, __file__)
)
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
        lanes: Finding -> lanes. first: Finding -> the test. test: the test that runs now; new: what was found since it
        began. kernels: launches by kernel.
    """

    def __init__(self) -> None:
        self.lanes: Counter[Finding] = Counter()
        self.first: dict[Finding, str] = {}
        self.test, self.new = "", set[Finding]()
        self.kernels: Counter[str] = Counter()
        self.programs = self.accesses = 0

    def add(self, finding: Finding, lanes: int = 1) -> None:
        self.lanes[finding] += int(lanes)
        self.first.setdefault(finding, self.test)
        self.new.add(finding)

    def begin(self, test: str) -> None:
        """From now on what is found is of this test."""
        self.test, self.new = test, set()

    def faults(self, new: bool = False) -> list[Finding]:
        """What is certainly wrong; if `new`, since `begin` alone, whether another test had it before or not."""
        return [f for f in sorted(self.new if new else self.lanes) if not f.suspect]

    def plain(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        found = [f._asdict() | {"lanes": n, "first": self.first[f]} for f, n in sorted(self.lanes.items())]
        return {
            "kernels": dict(self.kernels),
            "programs": self.programs,
            "accesses": self.accesses,
            "found": found,
        }

    def merge(self, plain: dict[str, Any]) -> None:
        """Adds what another process has found."""
        self.kernels.update(plain["kernels"])
        self.programs += plain["programs"]
        self.accesses += plain["accesses"]
        for row in plain["found"]:
            finding = Finding(*(row[name] for name in Finding._fields))
            self.lanes[finding] += row["lanes"]
            self.first.setdefault(finding, row["first"])

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
        if not path.startswith(FOREIGN):
            lines.append(f"{Path(path).name}:{frame.f_lineno}")
        elif lines:
            break
        frame = frame.f_back
    return " < ".join(lines)
