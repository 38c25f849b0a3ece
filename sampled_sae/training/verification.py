"""Whether the files of a folder are whole: a store of activations or codes, an SAE, a training, a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..inference import codes_files
from ..pretrained import CONFIG, FORMAT, ORIGIN, RUN, WEIGHTS, load_pretrained
from ..support import checksums
from ..support.atomic_files import read_json, read_json_lines
from .checkpoint import CHECKPOINT, read_checkpoint
from .sharded_checkpoint import RECORD, damaged_files, read_record
from .store_writer import MANIFEST, check_scale, damage, read_manifest
from .training_run import METRICS

RECORDS = (RUN, ORIGIN, "evaluation.json", "result.json", "sweep.json")
OK = "ok"
# (file, what is said of it, whether it is damaged)
Finding = tuple[Path, str, bool]


def verify(folder: Path) -> Iterator[Finding]:
    """Reads every file of this package in `folder`, and in its folders those of a sweep's or a group's members.

    Raises:
        ValueError: no such folder, or nothing of this package in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = False
    for place in places:
        for finding in _store(place) if (place / MANIFEST).exists() else _run(place):
            found = True
            yield finding
    if not found:
        raise ValueError(f"{folder}: holds no activations, codes, SAE, training or sweep of sampled-sae")


def _store(folder: Path) -> Iterator[Finding]:
    """Of activations, or of codes."""
    try:
        of_codes = codes_files.is_codes(folder)
        manifest = codes_files.read_manifest(folder) if of_codes else read_manifest(folder)
    except ValueError as error:
        yield _finding(folder / MANIFEST, error)
        return
    unfinished = "not finished; run the same encode command again"
    unfinished = unfinished if of_codes else "the harvest has not finished; run the same harvest command again"
    if not manifest["complete"]:
        yield folder / MANIFEST, unfinished, True
    else:
        scale = None if of_codes else _error(lambda path: check_scale(path.parent, manifest), folder / MANIFEST)
        yield _finding(folder / MANIFEST, scale)
    held_out = manifest.get("holdout")
    for entry in (*manifest["shards"], *([held_out] if held_out else [])):
        problem = (checksums.damage if of_codes else damage)(folder, entry)
        whole = OK if "crc32" in entry else "ok as far as its size and sum tell: no checksum, of an earlier version"
        yield folder / entry["file"], problem or whole, problem is not None


def _run(folder: Path) -> Iterator[Finding]:
    for path in (folder / name for name in RECORDS):
        if path.exists():
            yield _finding(path, _error(read_json, path))
    for path, read in ((folder / METRICS, _read_lines), (folder / CHECKPOINT, read_checkpoint)):
        if path.exists():
            yield _finding(path, _error(read, path))
    if (folder / RECORD).exists():
        yield from _shards(folder)
    if _has_sae(folder):
        error = _error(lambda path: load_pretrained(path.parent), folder / WEIGHTS)
        of_config = error is not None and str(error).startswith(str(folder / CONFIG))
        yield _finding(folder / CONFIG, error if of_config else None)
        yield _finding(folder / WEIGHTS, None if of_config else error)


def _shards(folder: Path) -> Iterator[Finding]:
    try:
        record = read_record(folder)
    except ValueError as error:
        yield _finding(folder / RECORD, error)
        return
    yield _finding(folder / RECORD, None)
    damaged = dict(damaged_files(folder, record))
    for path in (folder / record["folder"] / name for name in sorted(record["files"])):
        yield path, damaged.get(path, OK), path in damaged


def _has_sae(folder: Path) -> bool:
    """Or what is left of one: other libraries have files of the same names."""
    if (folder / CONFIG).exists():
        try:
            return read_json(folder / CONFIG).get("format") == FORMAT
        except ValueError:
            return (folder / WEIGHTS).exists()
    return (folder / RUN).exists()


def _error(read: Callable[[Path], object], path: Path) -> ValueError | None:
    try:
        read(path)
    except ValueError as error:
        return error
    return None


def _finding(path: Path, error: ValueError | None) -> Finding:
    return path, OK if error is None else str(error).removeprefix(f"{path}: "), error is not None


def _read_lines(path: Path) -> None:
    for _ in read_json_lines(path):
        pass
