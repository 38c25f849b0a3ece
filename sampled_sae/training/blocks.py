"""Activations that are read once and in their order, a bounded block at a time, the next one on a thread meanwhile."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .block_space import Room


class Source(Protocol):
    """Where a stream comes from.

    `widths` are those of its parts: one, or several that see the same tokens, such as the layers of a model.
    """

    @property
    def widths(self) -> list[int]: ...

    @property
    def about(self) -> list[dict[str, Any]]:
        """Of each part what a store's manifest has: source, and where known model, layer, context, and settings."""

    def read(self) -> list[Tensor] | None:
        """The next activations, float32 [n, width] on the CPU, n >= 0, of each part; None at the end."""

    def state_dict(self) -> dict[str, Any]:
        """The place behind what was read, in tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To such a place. ValueError where that cannot be."""


class Block(NamedTuple):
    """Tokens that are held together.

    number: from 0, in the order of the stream. least: how many tokens it was to have at least; it has fewer at the end
    of a stream. start: the source's place before it. parts: float32 [n, width] each.
    """

    number: int
    least: int
    start: dict[str, Any]
    parts: list[Tensor]


class Blocks:
    """The blocks of a source, of which one is held, and another while it is read ahead.

    Args:
        source: what is read.
        room: where it is put.

    Attributes:
        beginning: the place of the source before the first.
    """

    def __init__(self, source: Source, room: Room) -> None:
        self.source, self._room = source, room
        self.beginning = source.state_dict()
        self._starts: dict[int, dict[str, Any]] = {}
        self._next: int | None = 0  # what the source would read, where it is between two blocks
        self._held: Block | None = None
        self._reading: _Reading | None = None

    def get(self, index: int, least: int, start: dict[str, Any] | None = None) -> Block:
        """One block of at least so many tokens, fewer at the end of the source.

        Args:
            index: that of the block held, the one behind it, the first, or any whose `start` is known.
            least: tokens.
            start: the place of the source before it, as a checkpoint has it.

        Raises:
            ValueError: what the source raises; a block of before that it cannot go back to.
        """
        if self._held is not None and self._held.number == index:
            return self._held
        self.read_ahead(index, least, start)
        assert self._reading is not None
        self._held = None
        reading, self._reading = self._reading, None
        try:
            self._held = reading.result()
        except BaseException:
            reading.cancel()
            self._next = None
            raise
        self._next = index + 1
        self._starts = {index: self._held.start, index + 1: self.source.state_dict()}
        return self._held

    def read_ahead(self, index: int, least: int, start: dict[str, Any] | None = None) -> None:
        """Begins to read a block on a thread, unless that is under way. Arguments and errors are those of `get`."""
        if self._reading is not None:
            if (self._reading.index, self._reading.least) == (index, least):
                return
            self.stop()
        if self._next != index:
            place = start or self._starts.get(index) or (self.beginning if index == 0 else None)
            if place is None:
                raise ValueError(f"block {index} of the stream is not known; go on from a checkpoint of it")
            self._next = None
            self.source.load_state_dict(place)
        self._next = None
        self._reading = _Reading(self.source, self._room, index, least)

    def stop(self) -> None:
        """Ends what is read ahead, after the activations under way."""
        if self._reading is not None:
            self._starts[self._reading.index] = self._reading.start
            self._reading.cancel()
            self._reading = None


class _Reading:
    """One block, being read on a thread: also where it is waited for at once, so that every block is read alike."""

    def __init__(self, source: Source, room: Room, index: int, least: int) -> None:
        self.index, self.least, self.start = index, least, source.state_dict()
        self._source, self._cancelled = source, threading.Event()
        self._parts = [room.part(width) for width in source.widths]
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"activations, block {index}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        tokens = 0
        try:
            while tokens < self.least and not self._cancelled.is_set():
                found = self._source.read()
                if found is None:
                    break
                tokens += len(found[0])
                for part, x in zip(self._parts, found):
                    part.add(x)
        except BaseException as error:
            self._error = error

    def result(self) -> Block:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return Block(self.index, self.least, self.start, [part.whole() for part in self._parts])

    def cancel(self) -> None:
        self._cancelled.set()
        self._thread.join()
