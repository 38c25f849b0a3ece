"""`StreamLane`: one lane of a stream, its blocks shuffled, and what it gives to each batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support.argument_checks import check_finite
from ..support.atomic_files import field
from ..support.checksums import tensors_crc32
from ..support.even_slices import share
from .activation_stream import StreamedActivations

# tokens that are looked at together, so that a block may be larger than memory
_LOOKED_AT = 65_536


class FirstBlock(NamedTuple):
    """What is measured of a lane's first block.

    tokens: in it. squares: the sum of the squares of each part that is read. crc32: of what is in it; "" where nobody
    asked.
    """

    tokens: int
    squares: list[float]
    crc32: str


class StreamLane:
    """What one of several lanes gives to the batches of a training, or the only one.

    Args:
        part: what is read.
        batch_size: tokens a batch, of all lanes.
        seed: of the order.
        steps: batches that are asked for in all.
        lane: (which, of how many).
        processes: how many read the stream.

    Attributes:
        ahead: whether the next block is read while the one held is trained on.
    """

    def __init__(
        self,
        part: StreamedActivations,
        batch_size: int,
        seed: int,
        steps: int,
        lane: tuple[int, int],
        processes: int,
    ) -> None:
        self._part, self._blocks = part, part.stream.lane(*lane, processes)
        self._which, self._of = lane
        first, end = share(batch_size, *lane)
        self._batch_size, self._size = batch_size, end - first
        self._buffer = -(-part.stream.buffer_tokens // self._of)
        self._seed, self._steps = seed, steps
        self.ahead = False
        # first batch of a block -> (block, tokens asked for, place of the source)
        self._known: dict[int, tuple[int, int, dict[str, Any] | None]] = {0: (0, self._least(0), None)}
        self._first = self._index = -1
        self._count = 0  # batches in the block held

    def take(self, t: int, start: int, stop: int) -> list[Tensor]:
        """Its tokens start to stop of batch t, of each part that stands in a row: copies [n, width], not scaled."""
        self._seek(t)
        begin = (t - self._first) * self._size
        chosen = self._order[begin + start : begin + stop]
        return [x[chosen] for x in self._here()]

    def first_block(self, marked: bool) -> FirstBlock:
        """Measures it; `marked` with its checksum.

        Raises:
            ValueError: what the stream raises; NaN or inf.
        """
        self._seek(0)
        parts = self._here()
        squares = [0.0] * len(parts)
        for i, part in enumerate(parts):
            for x in part.split(_LOOKED_AT):
                check_finite(x, "activations", " of the first block")
                squares[i] += float(x.double().square().sum())
        crc32 = tensors_crc32({str(i): part for i, part in enumerate(parts)}) if marked else ""
        return FirstBlock(len(parts[0]), squares, crc32)

    def last_block(self) -> tuple[int, int]:
        """(first batch, the one behind the last) of the block that the last step is trained on."""
        self._seek(self._steps - 1)
        return self._first, self._first + self._count

    def state_dict(self) -> dict[str, Any]:
        """Where the block held begins; where none is, the last place that is known."""
        first = self._first if self._count else max(self._known)
        index, least, start = self._known[first]
        start = self._blocks.beginning if start is None else start
        return {"first": first, "block": index, "least": least, "source": start}

    def offer(self, where: str, state: Any) -> None:
        """A place of a checkpoint, to begin with in place of the beginning.

        Raises:
            ValueError: it is none; begins with `where`.
        """
        first = field(where, state, "first", int, 0)
        place = field(where, state, "block", int, 0), field(where, state, "least", int, 1)
        self._known[first] = *place, field(where, state, "source", dict)

    def stop(self) -> None:
        """Ends what is read ahead."""
        self._blocks.stop()

    def _here(self) -> list[Tensor]:
        """The parts of the block held that stand side by side."""
        parts = self._blocks.get(*self._known[self._first][:2]).parts
        return [parts[i] for i in self._part.indices]

    def _seek(self, t: int) -> None:
        """The block that has batch t, from the one held or the nearest place that is known before it."""
        if not self._count or t < self._first:
            self._hold(max(first for first in self._known if first <= t))
        while t >= self._first + self._count:
            self._hold(self._first + self._count)

    def _hold(self, first: int) -> None:
        """The block that begins with this batch."""
        index, least, start = self._known.get(first, (self._index + 1, self._least(first), None))
        found = self._blocks.get(index, least, start)
        tokens = len(found.parts[0])
        if tokens < least:
            raise ValueError(
                f"steps={self._steps}: {self._part.where} has ended, with tokens for "
                f"{first + tokens // self._size} steps of batch_size={self._batch_size}"
            )
        self._index, self._first, self._count = index, first, tokens // self._size
        self._known = {0: self._known[0], first: (index, least, found.start)}
        seed = (self._seed * 1_000_003 + index * self._of + self._which) % 2**64
        self._order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        behind = first + self._count
        if self.ahead and behind < self._steps:
            self._blocks.read_ahead(index + 1, self._least(behind))

    def _least(self, first: int) -> int:
        """Tokens that a block is to have which begins with batch `first`."""
        left, most = max(1, self._steps - first), self._buffer // self._size
        return (left if left <= most else min(most, -(-left // 2))) * self._size
