"""A folder that a command writes to: whether it can be written, and held by one process at a time."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .all_ranks import AllRanks
from .remote_files import AnyPath, RemotePath, is_url
from .timing import machine

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
# the lock, and temporary files of write_atomically and, inside it, of safetensors
_LEFTOVER = re.compile(re.escape(LOCK) + r"|\..+\.tmp|\.tmp\w{6}")
# a Path has lost the second slash
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# for a file of another machine to show, twice a second
_LOOKS = 60
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def check_output_folder(folder: Path, needed: int = 0) -> None:
    """Whether files of so many bytes can be written to a folder, which need not be there yet. Leaves nothing.

    Raises:
        ValueError: a file in its place or above it, no permission, a disk that is full or read-only.
    """
    if is_url(str(folder)) or (_URL.match(str(folder)) and not folder.exists()):
        raise ValueError(f"{folder}: is a URL, which is read and not written to; name a folder")
    try:
        place = folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{folder}: must be a folder, {'is' if place == folder else f'but {place} is'} a file")
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror or error})") from None
    if free < needed:
        raise ValueError(f"{folder}: {free / 1e9:.3g} GB are free on this disk, {needed / 1e9:.3g} GB are needed")


def is_leftover(name: str) -> bool:
    """Whether a file is one that a killed process leaves behind."""
    return _LEFTOVER.fullmatch(name) is not None


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Holds `folder` for this process and removes what killed writes left there; the folder is made if need be.

    A process that dies lets go of it, however it dies. A folder that was made and is empty at the end is removed.

    Args:
        work: what is done there, for the message to another process.

    Raises:
        BlockingIOError: another process holds it; says which.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        with _open_locked(path) as file:
            file.truncate(0)
            file.write(f"{work} (process {os.getpid()} on {socket.gethostname()})".encode())
            file.flush()
            for entry in folder.iterdir():
                if is_leftover(entry.name) and entry.name != LOCK and entry.is_file():
                    entry.unlink(missing_ok=True)
            try:
                yield
            finally:
                # Before the lock is let go: nobody may lock a file that is about to vanish. Windows wants it closed.
                with suppress(OSError):
                    path.unlink()
    finally:
        if sys.platform == "win32":
            with suppress(OSError):  # that of another process is open
                path.unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()  # nothing came of the work


def check_output_place(at: AnyPath) -> None:
    """As `check_output_folder`; what is wrong at a URL is known with the first file."""
    if isinstance(at, Path):
        check_output_folder(at)


@contextmanager
def held_by_first(folder: AnyPath, work: str, ranks: AllRanks) -> Iterator[None]:
    """As `locked`, by the first of several ranks for all of them. A URL has no locks: nobody holds it.

    Raises:
        ValueError: a rank that does not see the folder of the first.
        RankError: any of these on another rank.
    """
    if isinstance(folder, RemotePath):
        yield
        return
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(locked(folder, work))
        with ranks.together():
            if not _is_seen(folder / LOCK):
                raise ValueError(f"{folder}: not what the first rank sees there; all ranks need one file system")
        yield


def sharing(folder: Path | None, value: Any, ranks: AllRanks) -> list[Any]:
    """The values of the ranks that have the disk of `folder` in common, on any machine; for None this one's memory.

    Ranks of one machine know a disk by its number, those of others by a file that they see in the same folder.

    Raises:
        ValueError: as `check_output_folder`.
        RankError: that on another rank.
    """
    if ranks.size == 1:
        return [value]
    with ExitStack() as stack:
        mark, disk = "", None
        with ranks.together():
            if folder is not None:
                check_output_folder(folder)
                mark, disk = stack.enter_context(_marked(folder)), folder.stat().st_dev
        here = machine(), disk
        found = ranks.gather((here, mark, value))
        with ranks.together():  # when all have looked, the files may go
            return [
                of_rank
                for place, other, of_rank in found
                if place == here or (folder is not None and other and (folder / other).exists())
            ]


@contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """The name of a file that is in the folder meanwhile."""
    handle, path = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        yield Path(path).name
    finally:
        Path(path).unlink(missing_ok=True)


def _is_seen(path: Path) -> bool:
    """Whether a file that another process has just written is there; network file systems take a while to show it."""
    for _ in range(_LOOKS):
        if path.exists():
            return True
        time.sleep(0.5)
    return path.exists()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = open(path, "a+b")  # noqa: SIM115  # the caller closes it
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # the one who held it has removed it since
        except OSError as error:
            if error.errno not in _HELD:
                warnings.warn(f"{path}: no locks on this file system; let one process write there", stacklevel=3)
                return file
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            raise BlockingIOError(
                f"{path.parent}: in use by {holder}; wait for it, stop it or choose another folder"
            ) from None
        file.close()


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        file.seek(1 << 30)  # the bytes before it stay readable for others
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
