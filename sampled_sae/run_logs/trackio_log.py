"""A run in trackio."""

from __future__ import annotations

from typing import Any

from .run_about import RunAbout


class TrackioLog:
    """trackio knows runs by their names, so that the run's id is part of its name; tags are in its config."""

    def __init__(self, about: RunAbout) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=about.project,
            name=f"{about.name}-{about.id}",
            config={**about.config, "tags": list(about.tags), "folder": str(about.folder)},
            resume="allow",
            embed=False,
        )
        self._step = about.step

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def result(self, values: dict[str, float]) -> None:
        self._run.log({f"evaluation/{name}": value for name, value in values.items()}, step=self._step)

    def close(self, failed: bool) -> None:
        self._run.finish()
