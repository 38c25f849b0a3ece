"""Who is still there when something fails on one of several ranks: an alarm over the store that started them.

Each rank has a thread that waits for its bell. A rank that fails leaves its reason as the alarm, where there is none
yet, and rings all bells; the threads answer at once, whatever their rank is doing. A rank that was killed does not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

# for a thread to answer, on a machine that is busy with other things
ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.1
_ALARM, _VERDICT, _OVER, _UNAWARE = "alarm", "verdict", "over", b"unaware"
_FOREVER = timedelta(days=3650)
T = TypeVar("T")


@dataclass(frozen=True)
class Alarm:
    """What the first rank to fail has said.

    Attributes:
        rank: which one that was.
        reason: of its failure; None where it noticed no more than that another one does not answer.
        silent: ranks that gave no answer when the roll was called.
        behind: ranks that answered, and had noticed nothing themselves.
        ours: whether it falls to this rank to say so.
    """

    rank: int
    reason: str | None
    silent: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    ours: bool = False


def verdict(alarm: Alarm, error: BaseException) -> str:
    """What is said of a lost contact, which `error` has shown."""
    if alarm.silent:
        return f"{_named(alarm.silent)} no longer there: ended by the system, or its machine lost or standing still"
    if alarm.behind:
        return f"{_named(alarm.behind)} late: took no part in an exchange in time ({' '.join(str(error).split())})"
    return f"rank {alarm.rank}: lost contact, but all ranks are there ({' '.join(str(error).split())})"


def _named(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


class RollCall:
    """The alarm of one rank of `size`; `store` is a `torch.distributed.Store` that all of them share."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._heard = threading.Event()
        self._alarm: Alarm | None = None
        self._own: Alarm | None = None
        self._noticed = False
        # a wait blocks its client of the store
        self._thread = threading.Thread(target=self._listen, args=(store.clone(),), daemon=True)
        self._thread.start()

    def raise_alarm(self, reason: str | None) -> Alarm:
        """Tells all ranks of a failure on this one; returns the first alarm, which may be another's.

        Args:
            reason: None where this rank lost contact, which is no reason of its own: then the roll is called.
        """
        if self._own is not None:
            return self._own
        self._noticed = True
        mine = json.dumps([self.rank, reason])
        with suppress(RuntimeError):  # the rank that serves the store is gone, or all are leaving
            if self._store.compare_set(_ALARM, "", mine).decode() == mine:
                self._own = self._call_roll(reason)
                return self._own
        if self._heard.wait(3 * ANSWER_SECONDS) and self._alarm is not None:
            return self._alarm
        return Alarm(self.rank, reason, (0,) if reason is None and self.rank else (), ours=True)

    def _call_roll(self, reason: str | None) -> Alarm:
        """Where this rank's alarm is the first. It may serve the store, and leaves after all that answer."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self._store.set(_key("bell", rank), _ALARM)
        _wait_for(self._store, [_key("answer", rank) for rank in others], ANSWER_SECONDS)
        answers = {rank: self._store.get(key) for rank in others if self._store.check([key := _key("answer", rank)])}
        silent = [rank for rank in others if rank not in answers]
        behind = [rank for rank, answer in answers.items() if answer == _UNAWARE]
        with suppress(RuntimeError):
            self._store.set(_VERDICT, json.dumps([silent, behind]))
            _wait_for(self._store, [_key("read", rank) for rank in answers], ANSWER_SECONDS)
            self._store.set(_OVER, b"")
        return Alarm(self.rank, reason, tuple(silent), tuple(behind), ours=True)

    def close(self) -> None:
        """Ends the thread, which ends by itself where the store is gone."""
        with suppress(RuntimeError):
            self._store.set(_key("bell", self.rank), "close")
        self._thread.join()

    def _listen(self, store: Any) -> None:
        with suppress(RuntimeError):  # the store is gone
            store.wait([_key("bell", self.rank)], _FOREVER)
            if store.get(_key("bell", self.rank)).decode() == _ALARM:
                rank, reason = json.loads(store.get(_ALARM))
                store.set(_key("answer", self.rank), b"aware" if self._noticed else _UNAWARE)
                _wait_for(store, [_VERDICT], 2 * ANSWER_SECONDS)
                silent, behind = json.loads(store.get(_VERDICT)) if store.check([_VERDICT]) else ([], [])
                self._alarm = Alarm(rank, reason, tuple(silent), tuple(behind))
                store.set(_key("read", self.rank), b"")
                if self.rank == 0:  # it may serve the store
                    _wait_for(store, [_OVER], ANSWER_SECONDS)
        self._heard.set()


def in_time(exchange: Callable[[], T], seconds: float) -> list[T]:
    """What an exchange with other ranks returns, alone in a list; empty where it fails, or takes longer. It goes on."""
    found: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):  # another rank has ended
            found.append(exchange())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found


def _wait_for(store: Any, keys: list[str], seconds: float) -> None:
    """Until all are there, for a while. A wait of the store's own says on the standard error when it ends."""
    for _ in range(round(seconds / _LOOK_SECONDS)):
        if store.check(keys):
            return
        time.sleep(_LOOK_SECONDS)


def _key(kind: str, rank: int) -> str:
    return f"{kind}/{rank}"
