"""`RunLog`: what a training tells of itself as it goes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Protocol


class RunLog(Protocol):
    """One run in a place that shows runs; a class of your own with these three methods will do."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, finite values alone, when it is written."""

    def result(self, values: dict[str, float]) -> None:
        """What was measured at the end."""

    def close(self, failed: bool) -> None:
        """Nothing follows. `failed`: the training ended by an error or was stopped."""


class NoLog:
    """Of a training that is watched nowhere."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def result(self, values: dict[str, float]) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


NO_LOG = NoLog()


class SteadyLog:
    """A log whose troubles do not end a training: the first one is said, and nothing is sent after it.

    metrics.jsonl has every line all the same.
    """

    def __init__(self, log: RunLog, name: str) -> None:
        self._log: RunLog | None = log
        self._name = name

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda log: log.metrics(step, finite(values)))

    def result(self, values: dict[str, float]) -> None:
        self._try(lambda log: log.result(finite(values)))

    def close(self, failed: bool) -> None:
        self._try(lambda log: log.close(failed))
        self._log = None

    def _try(self, tell: Callable[[RunLog], None]) -> None:
        if self._log is None:
            return
        try:
            tell(self._log)
        except Exception as error:
            self._log = None
            said = " ".join(str(error).split())
            print(
                f"{self._name} gets no more of this run ({type(error).__name__}: {said}); metrics.jsonl has all of it",
                file=sys.stderr,
                flush=True,
            )


def finite(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among them that are neither NaN nor inf."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
