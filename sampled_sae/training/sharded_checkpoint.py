"""The checkpoint of a training by several ranks: a folder of `torch.distributed.checkpoint`, and a record of it.

`checkpoint.json` names the folder and has what is no tensor, and the checksums of the files. It is replaced once all
of them are on disk, and only then is the folder before removed: a killed writer leaves the last checkpoint whole.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..support.all_ranks import AllRanks
from ..support.atomic_files import errors_named, field, read_json_of, write_json
from ..support.checksums import file_crc32
from .checkpoint import CHECKPOINT

RECORD = "checkpoint.json"
FORMAT = "sampled-sae sharded checkpoint"
_FOLDERS = "checkpoint_*"
_METADATA = ".metadata"
FIELDS: dict[str, type] = {
    "folder": str,
    "files": dict,
    "settings": dict,
    "lanes": int,
    "step": int,
    "seconds": float,
    "plain": dict,
    "metrics": list,
}


def write_shards(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any], ranks: AllRanks) -> None:
    """Each rank writes what is its own of the tensors, of which those that are no DTensors are equal on all.

    Args:
        folder: of the training. tensors: by name. ranks: all call this.
        record: plain values; the fields of `FIELDS` but folder and files.
    """
    import torch.distributed.checkpoint as dcp  # a second, which one process alone never needs

    with ranks.together():
        place = folder / f"checkpoint_{record['step']:08d}"
        if ranks.first:
            if (folder / RECORD).exists() and read_record(folder)["folder"] == place.name:
                place = place.with_name(f"{place.name}_again")  # the same step once more: the first stays until then
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
    place = folder / ranks.share(place.name)
    try:
        with _failing_together(place, ranks), _quietly():
            writer = dcp.FileSystemWriter(place)
            dcp.save(tensors, storage_writer=writer, process_group=ranks.control, no_dist=ranks.size == 1)
    except Exception:
        if ranks.first:
            shutil.rmtree(place, ignore_errors=True)
        raise
    with ranks.together():
        own = [*sorted(place.glob(f"__{ranks.rank}_*")), *([place / _METADATA] if ranks.first else [])]
        found = {path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path)} for path in own}
    files = {name: entry for of_rank in ranks.gather(found) for name, entry in of_rank.items()}
    with ranks.together():
        if ranks.first:
            write_json(folder / RECORD, {"format": FORMAT, "folder": place.name, "files": files, **record})
            _remove_all_but(folder, place.name)


def read_record(folder: Path) -> dict[str, Any]:
    """What `checkpoint.json` says.

    Raises:
        ValueError: naming the file: damaged, foreign, or without one of its fields.
    """
    path = folder / RECORD
    record = read_json_of(path, FORMAT)
    for name, kind in FIELDS.items():
        field(path, record, name, kind)
    return record


def damaged_files(folder: Path, record: dict[str, Any], part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong with it) of those that the record lists, or of one of so many parts of them."""
    for name in sorted(record["files"])[part[0] :: part[1]]:
        entry, path = record["files"][name], folder / record["folder"] / name
        if not path.is_file():
            yield path, "no such file, but the record of the checkpoint lists it"
        elif path.stat().st_size != entry["bytes"] or file_crc32(path) != entry["crc32"]:
            yield path, "damaged, its bytes do not have the checksum that was written with them"


def read_shards(folder: Path, record: dict[str, Any], into: dict[str, Tensor], ranks: AllRanks) -> None:
    """Fills tensors, or of DTensors what is on this rank, whatever the layout was that wrote them.

    Raises:
        ValueError: a file that is missing or damaged, a tensor that is not in the checkpoint.
        RankError: one of these on another rank.
    """
    import torch.distributed.checkpoint as dcp

    with ranks.together():
        for path, problem in damaged_files(folder, record, (ranks.rank, ranks.size)):
            raise ValueError(f"{path}: {problem}")
    place = folder / record["folder"]
    with _failing_together(place, ranks), _quietly():
        reader = dcp.FileSystemReader(place)
        dcp.load(into, storage_reader=reader, process_group=ranks.control, no_dist=ranks.size == 1)


def lanes_of(folders: list[Path], ranks: AllRanks, asked: int | None) -> int:
    """The lanes of the trainings in `folders`, which a checkpoint there settles; else as asked, or one a process.

    Raises:
        ValueError: other lanes are asked for than those of a checkpoint.
    """
    found: int | None = None
    with ranks.together():
        if ranks.first:
            for folder in folders:
                if (folder / RECORD).exists():
                    found = int(read_record(folder)["lanes"])
                elif (folder / CHECKPOINT).exists():
                    found = 1
                if found is not None and asked not in (None, found):
                    raise ValueError(f"lanes={asked}: the checkpoint in {folder} has {found}; leave it out")
    found = ranks.share(found)
    return (ranks.size if asked is None else asked) if found is None else found


def remove_checkpoint(folder: Path) -> None:
    """Of either kind."""
    (folder / RECORD).unlink(missing_ok=True)
    _remove_all_but(folder, None)


def _remove_all_but(folder: Path, name: str | None) -> None:
    for path in folder.glob(_FOLDERS):
        if path.name != name and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)


@contextmanager
def _failing_together(place: Path, ranks: AllRanks) -> Iterator[None]:
    """torch's error names ranks and holds theirs; each raises its own, and the others name it."""
    from torch.distributed.checkpoint.api import CheckpointException

    failures: Mapping[int, Any] = {}
    try:
        yield
    except CheckpointException as error:
        failures = error.failures
    if failures:
        with ranks.together(), errors_named(place):
            if ranks.rank in failures:
                raise failures[ranks.rank][0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's notes on its own deprecations, and on a process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
