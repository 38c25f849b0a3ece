"""Where the field watches its runs: wandb, TensorBoard and trackio, behind one small protocol.

`LogPlace` says which of them a training is to have, under which name.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from .support.argument_checks import check_choice
from .support.atomic_files import read_json, write_json

PROJECT = "sampled-sae"
# the runs that a folder has in such places, so that a training which goes on goes on there too
RECORD = "log.json"


class RunLog(Protocol):
    """One run in a place that shows runs; a class of your own with these three methods will do."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, finite values alone, when it is written."""

    def result(self, values: dict[str, float]) -> None:
        """What was measured at the end."""

    def close(self, failed: bool) -> None:
        """Nothing follows. `failed`: the training ended by an error or was stopped."""


class SteadyLog:
    """A log whose troubles do not end a training: the first one is said, and nothing is sent after it.

    metrics.jsonl has every line all the same. Without a log it is that of a training that is watched nowhere.
    """

    def __init__(self, log: RunLog | None = None, name: str = "") -> None:
        self._log, self._name = log, name

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda log: log.metrics(step, _finite(values)))

    def result(self, values: dict[str, float]) -> None:
        self._try(lambda log: log.result(_finite(values)))

    def close(self, failed: bool) -> None:
        self._try(lambda log: log.close(failed))
        self._log = None

    def _try(self, tell: Callable[[RunLog], None]) -> None:
        if self._log is None:
            return
        try:
            tell(self._log)
        except Exception as error:
            self._log = None
            said = " ".join(str(error).split())
            print(
                f"{self._name} gets no more of this run ({type(error).__name__}: {said}); metrics.jsonl has all of it",
                file=sys.stderr,
                flush=True,
            )


NO_LOG = SteadyLog()


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among them that are neither NaN nor inf."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


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


class TensorboardLog:
    """In `tensorboard/` of the run's folder. Of a run that goes on, the points beyond its checkpoint are purged."""

    def __init__(self, about: RunAbout) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = about.step + 1 if about.step else None
        self._writer: Any = SummaryWriter(str(about.folder / "tensorboard"), purge_step=purge)
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


OPENERS: MappingProxyType[str, Callable[[RunAbout], RunLog]] = MappingProxyType(
    {"wandb": WandbLog, "tensorboard": TensorboardLog, "trackio": TrackioLog}
)
KINDS = tuple(OPENERS)


@dataclass(frozen=True)
class LogPlace:
    """Where runs are shown.

    Args:
        kind: "wandb", "tensorboard" or "trackio", each an extra of that name. Their own environment variables say where
            wandb and trackio send what they get (`WANDB_MODE=offline`, `TRACKIO_SPACE_ID`). TensorBoard's files are in
            `tensorboard/` of the run's folder.
        project: that runs stand under in wandb and trackio.
        name: of the run; that of its folder when absent. In a sweep it goes before the names of the members.
        tags: of the run.

    Raises:
        ValueError: another kind, a project or tag that is empty.
        ImportError: without its package; names the extra.
    """

    kind: str
    project: str = PROJECT
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("log", self.kind, KINDS)
        for what, text in (("project", self.project), ("name", self.name), *(("tags", tag) for tag in self.tags)):
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise ValueError(f"{what}={text!r}: must be a name that is not empty")
        object.__setattr__(self, "tags", tuple(self.tags))
        if importlib.util.find_spec(self.kind) is None:
            raise ImportError(f'log={self.kind!r}: needs {self.kind}: pip install "sampled-sae[{self.kind}]"')

    def open(self, folder: Path, config: dict[str, Any], step: int, member: str = "") -> RunLog:
        """A run that begins, or for step > 0 goes on.

        Args:
            folder: of the training; log.json there remembers the run.
            config: settings, plain values.
            step: steps done already.
            member: name in a sweep or a group.

        Raises:
            ValueError: the place refuses it, with its words.
        """
        name = "/".join(part for part in (self.name, member) if part) or folder.resolve().name
        about = RunAbout(self._id(folder, step), self.project, name, self.tags, config, folder, step)
        try:
            log = OPENERS[self.kind](about)
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"log={self.kind!r}: the run cannot begin there ({type(error).__name__}: {said})"
            ) from error
        return SteadyLog(log, self.kind)

    def _id(self, folder: Path, step: int) -> str:
        """That of the run which goes on, if it was shown in the same place; else a new one, which is kept."""
        path = folder / RECORD
        known = read_json(path) if path.is_file() else {}
        entry = known.get(self.kind)
        if step and isinstance(entry, dict) and entry.get("project") == self.project and entry.get("id"):
            return str(entry["id"])
        new = secrets.token_hex(4)
        write_json(path, {**known, self.kind: {"project": self.project, "id": new}})
        return new
