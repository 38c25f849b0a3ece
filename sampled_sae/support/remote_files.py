"""Files and folders at a URL of fsspec (s3://, gs://, https://, memory://, ...), used as those of a `Path` are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Union

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")


def is_url(name: Any) -> bool:
    """Whether it is the URL of a file or folder and not a path. A drive of Windows has one letter."""
    return isinstance(name, (str, RemotePath)) and _URL.match(str(name)) is not None


def place(name: Any) -> Any:
    """A `RemotePath` for a URL, else a `Path`."""
    return RemotePath(str(name)) if is_url(name) else Path(name)


def output_place(name: Any) -> AnyPath:
    """As `place`, to write to: a `Path` also for a URL of this machine's own files, where a write can be atomic."""
    found: AnyPath = place(name)
    return found.local() or found if isinstance(found, RemotePath) else found


class RemotePath:
    """What reading needs of a `Path`, and the writing of whole files, at a URL.

    Raises:
        ImportError: the package for this kind of URL is missing; says which.
        ValueError: fsspec knows no such kind.
        OSError: by the methods, what the other side says.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ImportError(f'{url}: needs fsspec: pip install "sampled-sae[remote]"') from error
        try:
            self._files, self._path = url_to_fs(self._url)
        except ImportError as error:
            raise ImportError(f"{url}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{url}: {error}") from None

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self._path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._path).suffix

    def exists(self) -> bool:
        """By what is there now: another process may have written it since this one has last looked."""
        return self._info(anew=True) is not None

    def is_file(self) -> bool:
        found = self._info() or self._info(anew=True)
        return found is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        return bool(self._files.isdir(self._path))

    def iterdir(self) -> Iterator[RemotePath]:
        for path in self._files.ls(self._path, detail=False):
            if (name := PurePosixPath(path).name) and path.rstrip("/") != self._path.rstrip("/"):
                yield self / name

    def size(self) -> int:
        """Bytes."""
        return int(self._files.size(self._path) or 0)

    def read_bytes(self) -> bytes:
        return bytes(self._files.cat_file(self._path))

    def write_bytes(self, data: bytes) -> None:
        """Makes or replaces the file. It is there at once on stores of objects; elsewhere readers may see a part.

        Folders above it are made where the other side asks for them.

        Raises:
            OSError: what the other side says, or a kind of URL that is read alone.
        """
        try:
            try:
                self._files.pipe_file(self._path, data)
            except FileNotFoundError:  # stores of objects have no folders
                self._files.makedirs(str(PurePosixPath(self._path).parent), exist_ok=True)
                self._files.pipe_file(self._path, data)
        except NotImplementedError:
            raise OSError(f"{self}: URLs of this kind can be read and not written to") from None
        except OSError as error:
            raise OSError(f"{self}: cannot be written ({error})") from error

    def open(self, mode: str = "rb") -> Any:
        return self._files.open(self._path, mode)

    def local(self) -> Path | None:
        """The path of what is on this machine; None elsewhere."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self._path) if isinstance(self._files, LocalFileSystem) else None

    def resolve(self) -> RemotePath:
        return self

    def _info(self, anew: bool = False) -> dict[str, Any] | None:
        """What the other side says of it; None where nothing is there.

        anew: without the listings that some kinds keep for as long as a process lives.

        Raises:
            OSError: it says neither, a lost connection for one, where fsspec's own `exists` and `isfile` would say no.
        """
        try:
            if anew:
                self._files.invalidate_cache(self._path)
            found: dict[str, Any] = self._files.info(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # some kinds have errors of their own
            raise OSError(f"{self}: cannot be looked up ({error})") from error
        return found


AnyPath = Union[Path, RemotePath]  # noqa: UP007  (evaluated at import)


def local_copy(url: str) -> Path:
    """A file at a URL as one of this machine, for as long as this process lives."""
    import fsspec

    return Path(fsspec.open_local(f"simplecache::{url}"))
