"""A run in Weights & Biases."""

from __future__ import annotations

from typing import Any

from .run_about import RunAbout


class WandbLog:
    """A run of its own even where another one is under way. wandb drops the steps that it has already."""

    def __init__(self, about: RunAbout) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=about.project,
            name=about.name,
            id=about.id,
            tags=list(about.tags) or None,
            config=about.config,
            dir=str(about.folder),
            resume="allow",
            reinit="create_new",
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def result(self, values: dict[str, float]) -> None:
        self._run.summary.update({f"evaluation/{name}": value for name, value in values.items()})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
