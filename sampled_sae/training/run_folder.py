"""`RunFolder`: the SAE and run.json that a training leaves in its folder, where no other training may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import SampledSAEConfig
from ..pretrained import CONFIG, EVALUATION, RUN, WEIGHTS
from ..sae import SampledSAE
from ..support.all_ranks import AllRanks
from ..support.atomic_files import field, read_json, write_json
from ..support.checksums import file_crc32
from .checkpoint import CHECKPOINT
from .same_settings import completed
from .sharded_checkpoint import RECORD


class RunFolder:
    """A folder as it was when it was last looked at.

    Args:
        path: of the folder, which may not be there yet.
        ranks: the processes of the training, of which the first one writes.
    """

    def __init__(self, path: Path, ranks: AllRanks) -> None:
        self.path = path
        self._ranks = ranks
        self.look()

    def look(self) -> None:
        """What is there now was written by this training."""
        self._seen = self._files()

    def check_unchanged(self) -> None:
        """BlockingIOError where another process has written a checkpoint or an SAE since."""
        if self._files() != self._seen:
            raise BlockingIOError(f"{self.path}: another training has written there meanwhile; start again")

    def check_same(self, about: dict[str, Any], config: SampledSAEConfig) -> None:
        """ValueError where the SAE there is another than the one of `config` and `about`, that of this training."""
        if not (self.path / CONFIG).exists():
            return
        then = read_json(self.path / RUN) if (self.path / RUN).exists() else {}
        of_same = {**{name: then.get(name) for name in about}, "train": completed(then.get("train"))} == about
        saved = field(self.path / CONFIG, read_json(self.path / CONFIG), "sae", dict)
        if not of_same or {**saved, "screen": None} != {**config.to_dict(), "screen": None}:
            raise ValueError(
                f"{self.path}: holds an SAE that is not of this training, and no checkpoint; it would be replaced, "
                "use another folder"
            )

    def write(self, sae: SampledSAE, run: dict[str, Any]) -> None:
        """The SAE and run.json. An evaluation.json of another SAE, which this one replaces, is removed."""
        measured = self._weights_sum() if self._ranks.first and (self.path / EVALUATION).exists() else None
        sae.save_pretrained(self.path)
        self.look()
        with self._ranks.together():
            if self._ranks.first:
                write_json(self.path / RUN, run)
                if measured not in (None, self._weights_sum()):  # of the SAE that was there before
                    (self.path / EVALUATION).unlink(missing_ok=True)

    def _weights_sum(self) -> str:
        """The checksum of the saved weights; empty where there are none."""
        path = self.path / WEIGHTS
        return file_crc32(path) if path.is_file() else ""

    def _files(self) -> list[tuple[int, int] | None]:
        """Size and time of what one training would take from another."""
        paths = [self.path / name for name in (CHECKPOINT, RECORD, WEIGHTS)]
        found = [path.stat() if path.exists() else None for path in paths]
        return [None if stat is None else (stat.st_size, stat.st_mtime_ns) for stat in found]
