"""`LogPlace`: which log a training is to have, under which name."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..support.argument_checks import check_choice
from ..support.atomic_files import read_json, write_json
from .run_about import RunAbout
from .run_log import RunLog, SteadyLog
from .tensorboard_log import TensorboardLog
from .trackio_log import TrackioLog
from .wandb_log import WandbLog

OPENERS: MappingProxyType[str, Callable[[RunAbout], RunLog]] = MappingProxyType(
    {"wandb": WandbLog, "tensorboard": TensorboardLog, "trackio": TrackioLog}
)
KINDS = tuple(OPENERS)
PROJECT = "sampled-sae"
# the runs that a folder has in such places, so that a training which goes on goes on there too
RECORD = "log.json"


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
