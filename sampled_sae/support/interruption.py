"""Ctrl-C and SIGTERM: noted while a step is under way, so that the work is saved before it stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work.

    Attributes:
        number: of the signal. A process that it stops exits with 128 + number.
    """

    def __init__(self, number: int, message: str = "") -> None:
        stopped = f"stopped by {signal.Signals(number).name}"
        super().__init__(f"{stopped}: {message}" if message else stopped)
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """In its context SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt; in the main thread alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interruption:
    """In its context the first signal is noted, and the second does what it did before: it stops at once.

    Outside the main thread, where Python delivers no signals, it notes none.

    Attributes:
        number: of the signal that has come, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (None, signal.SIG_IGN):  # what is ignored stays so, as under nohup
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
