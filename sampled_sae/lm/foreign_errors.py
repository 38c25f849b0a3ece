"""Errors of other libraries, said in this package's way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever is raised within, as one sentence after `what`: few of these libraries say what they speak of."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise kind(f"{what}: {said}") from error
