"""A run in TensorBoard's files."""

from __future__ import annotations

import json
from typing import Any

from .run_about import RunAbout

FOLDER = "tensorboard"


class TensorboardLog:
    """In `tensorboard/` of the run's folder. Of a run that goes on, the points beyond its checkpoint are purged."""

    def __init__(self, about: RunAbout) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = about.step + 1 if about.step else None
        self._writer: Any = SummaryWriter(str(about.folder / FOLDER), purge_step=purge)
        self._step = about.step
        head = {"project": about.project, "name": about.name, "tags": list(about.tags)}
        text = json.dumps({**head, **about.config}, indent=2)
        self._writer.add_text("settings", f"```json\n{text}\n```", about.step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def result(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"evaluation/{name}", value, self._step)

    def close(self, failed: bool) -> None:
        self._writer.close()
