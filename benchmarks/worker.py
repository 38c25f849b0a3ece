"""A session in a process of its own, so that its memory, threads and imports disturb no other; or in this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")


class WorkerError(RuntimeError):
    """What went wrong in a worker, in a line; the worker is of no more use."""


class Worker:
    """Makes session(*args) in a new process and calls its methods there, one at a time.

    Only a worker that has been asked computes: the others wait on their pipes.

    Args:
        session: a class that the new process can import.
        args: what it is made with; anything that can be pickled.
        tree: a folder that comes first on the new process's path.
    """

    def __init__(self, session: type, *args: Any, tree: Path | None = None) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(theirs, session, args), daemon=True)
        before = sys.path[:]
        sys.path[:0] = [] if tree is None else [str(tree)]
        self._process.start()
        sys.path[:] = before
        theirs.close()

    def call(self, method: str, *args: Any) -> Any:
        """What session.method(*args) returns.

        Raises:
            WorkerError: here and in `answer`: an exception in the worker, also one in making it, or its death.
        """
        self.ask(method, *args)
        return self.answer()

    def ask(self, method: str, *args: Any) -> None:
        """Begins a call whose `answer` is fetched later."""
        # one that is dead has left its reason in the pipe
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send((method, args))

    def answer(self, seconds: float | None = None) -> Any:
        """What was asked for; a worker that gives it later than this is ended."""
        if seconds is not None and not self._pipe.poll(max(0.0, seconds)):
            self._process.kill()
            self.close()
            raise WorkerError("the process was stopped: its last call took too long")
        try:
            done, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise WorkerError(f"the process died, exit code {self._process.exitcode}") from None
        if not done:
            self.close()
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """Ends the process and frees its memory."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


class Here:
    """The same in this process, for the time that starting another takes."""

    def __init__(self, session: type, *args: Any, tree: None = None) -> None:
        self._session, self._args = session, args
        self._made: Any = None

    def call(self, method: str, *args: Any) -> Any:
        try:
            self._made = self._made or self._session(*self._args)
            return getattr(self._made, method)(*args)
        except Exception as error:
            self.close()
            raise WorkerError(one_line(error)) from None

    def close(self) -> None:
        self._made = None


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def serve(pipe: Connection, session: type, args: tuple[Any, ...]) -> None:
    """The worker's side: until the pipe is closed."""
    try:
        made = session(*args)
        with contextlib.suppress(EOFError):
            while True:
                method, given = pipe.recv()
                pipe.send((True, getattr(made, method)(*given)))
    except Exception as error:
        pipe.send((False, one_line(error)))
