"""A session in a process of its own, so that its memory, threads and imports disturb no other; or in this one."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """What went wrong in a worker, in a line; the worker is of no more use."""


class Worker:
    """Makes session(*args) in a new process and calls its methods there, one at a time.

    Only a worker that has been asked computes: the others wait on their pipes.

    Args:
        session: a class that the new process can import.
        args: what it is made with; anything that can be pickled.
        tree: a folder that comes first on the new process's path.

    Raises:
        WorkerError: here and in `call`: an exception in the worker, or its death.
    """

    def __init__(self, session: type, *args: Any, tree: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, session, args), daemon=True)
        with first_on_path(tree):
            self._process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *args: Any) -> Any:
        """What session.method(*args) returns."""
        self._pipe.send((method, args))
        return self._answer()

    def close(self) -> None:
        """Ends the process and frees its memory."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            done, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"the process died, exit code {self._process.exitcode}") from None
        if not done:
            self.close()
            raise WorkerError(value)
        return value


class Here:
    """The same in this process, for the time that starting another takes."""

    def __init__(self, session: type, *args: Any, tree: None = None) -> None:
        self._session: Any = None
        self._session = self._made(session, *args)

    def call(self, method: str, *args: Any) -> Any:
        return self._made(getattr(self._session, method), *args)

    def close(self) -> None:
        self._session = None

    def _made(self, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            self.close()
            raise WorkerError(one_line(error)) from None


@contextmanager
def first_on_path(tree: Path | None) -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = sys.path[:]
    sys.path[:0] = [] if tree is None else [str(tree)]
    try:
        yield
    finally:
        sys.path[:] = before


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def serve(pipe: Connection, session: type, args: tuple[Any, ...]) -> None:
    """The worker's side: until the pipe is closed."""
    try:
        made = session(*args)
        pipe.send((True, None))
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:
                return
            pipe.send((True, getattr(made, method)(*given)))
    except Exception as error:
        pipe.send((False, one_line(error)))
