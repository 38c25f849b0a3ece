"""`RunAbout`: what a log is told of a run when it begins, or goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunAbout:
    """A run that is to be shown.

    Attributes:
        id: of the run, the same each time it goes on.
        project, name, tags: that it is shown under.
        config: its settings, plain values.
        folder: where its files are.
        step: steps done already.
    """

    id: str
    project: str
    name: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    folder: Path
    step: int
