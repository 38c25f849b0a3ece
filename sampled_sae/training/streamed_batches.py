"""`StreamedBatches`: shuffled batches of a stream, which is read once, in order and no further than they need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..support.argument_checks import check_finite, check_integer
from ..support.atomic_files import field
from .activation_stream import StreamedActivations
from .store_writer import LARGEST


class StreamedBatches:
    """The batches of a training on a stream.

    Each block of the stream is shuffled in memory, in an order that depends on (seed, block) alone; the tokens left at
    its end, fewer than a batch, are dropped. The last two blocks share what is left to read evenly, so that the
    threshold is calibrated on no small one. The scale is that of the first block.

    Args:
        part: what is read.
        batch_size: tokens a batch.
        seed: of the order.
        steps: batches that are asked for in all.

    Attributes:
        rows: (0, batch_size): a stream is read by one process.
    """

    lanes = 1

    def __init__(self, part: StreamedActivations, batch_size: int, seed: int, steps: int) -> None:
        self._part, self._blocks = part, part.blocks
        self.batch_size, self.seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed, 0)
        self.steps = check_integer("steps", steps, 1)
        if self.batch_size > part.buffer_tokens:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {part.buffer_tokens}, the buffer_tokens of the stream"
            )
        self.rows = (0, self.batch_size)
        self._ahead = False
        self._scales: list[float] | None = None  # of x, and of a pair of its targets
        # first batch of a block -> (block, tokens asked for, place of the source)
        self._known: dict[int, tuple[int, int, dict[str, Any] | None]] = {0: (0, self._least(0), None)}
        self._first = self._index = -1
        self._count = 0  # batches in the block held

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Activations times this have mean ||x||^2 = d_in, by the first block; one number a layer of several."""
        return tuple(self.scales) if self._part.layers > 1 else self.scales[0]

    @property
    def output_scale(self) -> float:
        """The same of the targets; 1 where there are none."""
        return self.scales[1] if self._part.d_out is not None else 1.0

    @property
    def scales(self) -> list[float]:
        """Of what is read, layer by layer, and, of a pair, of what is reconstructed."""
        if self._scales is None:
            self._seek(0)
            self._scales = [self._scale_of(x) for x in self._here()]
        return self._scales

    def batch(self, t: int) -> Tensor:
        """Batch t >= 0, times the scale: [batch_size, d_in], of a pair [batch_size, d_in + d_out], each times its own.
        Quick for the block held and the one behind it.

        Raises:
            ValueError: what the stream raises, its end, NaN or inf in the batch; with the step.
        """
        scales = self.scales
        self._seek(t)
        start = (t - self._first) * self.batch_size
        chosen = self._order[start : start + self.batch_size]
        found = [x[chosen].mul_(scale) for x, scale in zip(self._here(), scales)]
        x = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        check_finite(x, "activations", f" at step {t}")
        return x

    def calibration_batches(self, n: int) -> range:
        """Numbers of at most n batches that the threshold is calibrated on: those of the last block trained on."""
        self._seek(self.steps - 1)
        return range(self._first, self._first + self._count)[-n:]

    def state_dict(self) -> dict[str, Any]:
        """Where the block held begins; where none is, the last place that is known."""
        first = self._first if self._count else max(self._known)
        index, least, start = self._known[first]
        start = self._blocks.beginning if start is None else start
        of_targets = {} if self._part.d_out is None else {"output_scale": self.output_scale}
        return {"first": first, "block": index, "least": least, "source": start, "scale": self.scale, **of_targets}

    def offer(self, where: str, state: Any) -> None:
        """A place of a checkpoint, to begin with in place of the beginning.

        Raises:
            ValueError: it is none, or of another stream; begins with `where`.
        """
        names = ("scale",) if self._part.d_out is None else ("scale", "output_scale")
        if self._part.layers > 1:
            found = field(where, state, "scale", (list, tuple))
            if len(found) != self._part.layers or not all(isinstance(scale, float) for scale in found):
                raise ValueError(f"{where}: scale={found!r}: must be {self._part.layers} numbers, one a layer")
            scales = [float(scale) for scale in found]
        else:
            scales = [float(field(where, state, name, float)) for name in names]
        if self._scales not in (None, scales):
            raise ValueError(f"{where}: scales {scales}, the stream has {self._scales}")
        first = field(where, state, "first", int, 0)
        place = field(where, state, "block", int, 0), field(where, state, "least", int, 1)
        self._known[first] = *place, field(where, state, "source", dict)
        self._scales = scales

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Within it the next block is read while the one held is trained on."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False
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
                f"steps={self.steps}: {self._part.where} has ended, with tokens for "
                f"{first + tokens // self.batch_size} steps of batch_size={self.batch_size}"
            )
        self._index, self._first, self._count = index, first, tokens // self.batch_size
        self._known = {0: self._known[0], first: (index, least, found.start)}
        seed = (self.seed * 1_000_003 + index) % 2**64
        self._order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        behind = first + self._count
        if self._ahead and behind < self.steps:
            self._blocks.read_ahead(index + 1, self._least(behind))

    def _least(self, first: int) -> int:
        """Tokens that a block is to have which begins with batch `first`."""
        left, most = max(1, self.steps - first), self._part.buffer_tokens // self.batch_size
        return (left if left <= most else min(most, -(-left // 2))) * self.batch_size

    def _scale_of(self, x: Tensor) -> float:
        check_finite(x, "activations", " of the first block")
        square = float(x.double().square().sum()) / len(x)
        if not 0 < square < LARGEST**2:
            raise ValueError(f"{self._part.where}: the first {len(x)} activations have a mean square of {square:.3g}")
        return math.sqrt(x.shape[1] / square)
