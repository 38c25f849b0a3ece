"""Files written whole or not at all, and read with what they hold checked."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .remote_files import AnyPath, RemotePath

READER_WAITS = 40  # of 0.05 s each, for readers that hold a file on Windows


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)`, flush to disk, rename to `path`. The folder is made if need be.

    Raises:
        OSError: naming `path` and the reason, a full disk too, of which torch and safetensors have errors of their own.
    """
    # One name for all tries: what a kill left behind is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            temporary.touch()
            usual = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            # safetensors makes files only their owner can read; a shared folder wants the usual permissions.
            temporary.chmod(usual)
            # Windows flushes only what is open for writing.
            with open(temporary, "r+b") as written:
                os.fsync(written.fileno())
            _replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """At once and to be seen by readers; not atomic. Errors as those of `write_atomically`."""
    with errors_named(path), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def _replace(temporary: Path, path: Path) -> None:
    """Windows refuses while a reader has the old file open: it is waited for."""
    for _ in range(READER_WAITS):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(0.05)
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    """The new name, to disk. Windows opens no folders, and some file systems flush none."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Around a write: where torch and safetensors have errors of their own, the system's, which names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if number := _system_error(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _system_error(error: BaseException) -> int | None:
    """The system's number for what stopped a write; None where something else did."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    if isinstance(error.__context__, OSError):
        return error.__context__.errno
    # torch says no more than that the file is shorter than what was written to it
    return errno.ENOSPC if re.search("unexpected pos|file write failed|iostream", str(error)) else None


def write_text(path: AnyPath, text: str) -> None:
    """In UTF-8, with the line ends as they are."""
    if isinstance(path, RemotePath):
        return path.write_bytes(text.encode())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_json(path: AnyPath, value: Any) -> None:
    """Strict JSON: NaN and inf become null."""
    write_text(path, json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(without_nan(value), allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """`value` with None where it has NaN or inf, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return value


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: naming the file, when it is missing, unreadable or not an object.
    """
    try:
        return parse_json(path, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None


def read_json_of(path: AnyPath, format: str, version: int | None = None) -> dict[str, Any]:
    """A JSON object whose fields `format` and, where it is asked for, `version` are these.

    Raises:
        ValueError: naming the file, when it is missing, unreadable, not an object or foreign.
    """
    found = read_json(path)
    wanted = {"format": format} if version is None else {"format": format, "version": version}
    if any(found.get(name) != value for name, value in wanted.items()):
        has, must = (", ".join(f"{name}={of.get(name)!r}" for name in wanted) for of in (found, wanted))
        raise ValueError(f"{path}: {has}: must be {must}")
    return found


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for errors, JSON object) for each line.

    Raises:
        ValueError: naming the line that is none.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}: line {number}"
        yield where, parse_json(where, line)


def parse_json(where: AnyPath | str, text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8; ValueError that begins with `where` for anything else."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        ValueError: naming the file, when it is missing, truncated or foreign.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def read_rows(path: Path, name: str, start: int, stop: int | None) -> Tensor:
    """Rows start to stop of one tensor of a safetensors file, without reading the others."""
    with safe_open(path, "pt") as file:
        rows: Tensor = file.get_slice(name)[start:stop]
    return rows


def field(
    where: AnyPath | str, values: Any, name: str, kind: type | tuple[type, ...] = int, least: float = -math.inf
) -> Any:
    """`values[name]` of what a file holds, of the type it must have; numbers finite and not below `least`.

    `where` is the file, or the place in it, as errors name it. None stands for what is missing; an int is a float too,
    a bool is no number.

    Raises:
        ValueError: naming the place, the field, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r}: must be an object with the field {name!r}")
    value = values.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        allowed = " or ".join(k.__name__.replace("NoneType", "null") for k in kinds)
        raise ValueError(f"{where}: {name}={value!r}: must be of type {allowed}")
    if isinstance(value, (int, float)) and not least <= value < math.inf:
        raise ValueError(f"{where}: {name}={value!r}: must be a finite number >= {least}")
    return value
