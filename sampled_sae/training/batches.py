"""`ShuffledStream`: batches of activations that can be read in any order, shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..support.argument_checks import check_finite, check_integer
from ..support.even_slices import share
from .activations import Activations

GROUP_BYTES = 1 << 30

# a shard, and which of its tokens
Piece = tuple[int, int, int]
# what is held in memory at once, and the batches that come of it
Group = tuple[list[Piece], int]


class ShuffledStream:
    """Batches of a store in an order that depends on (seed, batch number, lanes) alone.

    Each epoch visits the shards in a new order, in groups of up to 1 GiB that are shuffled in memory. The tokens
    left at the end of a group, fewer than a batch, are dropped. A resumed run needs no saved state: it asks for
    the batch of its step.

    With several lanes, the shards of an epoch in their order are cut into as many stretches of equal length, each of
    which is grouped and shuffled by itself; a batch has an equal part of each, in their order. So one of as many
    processes reads one lane, and what all of them read together is the same batch, whoever asks for which part of it.
    An epoch ends with the first lane that has no more.

    Args:
        store: the activations.
        batch_size: tokens a batch.
        seed: of the order.
        lanes: into how many stretches an epoch is cut; at most batch_size.
        part: (which, of how many) equal parts of each batch are asked for.

    Attributes:
        rows: (start, stop) of that part among the tokens of a batch.
    """

    def __init__(
        self, store: Activations, batch_size: int, seed: int = 0, lanes: int = 1, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.store = store
        self.batch_size, self.seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed, 0)
        self.lanes = check_integer("lanes", lanes, 1)
        if self.batch_size < max(self.lanes, part[1]):
            raise ValueError(f"batch_size={batch_size}: must be at least {max(self.lanes, part[1])}, a token a process")
        self.rows = share(self.batch_size, *part)
        self._plans: dict[int, list[list[Group]]] = {}
        self._loaded: dict[int, tuple[tuple[int, int], Tensor]] = {}
        if self.batches_per_epoch(0) == 0:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {sum(store.tokens)}, the tokens in {store.where}"
            )

    @property
    def scale(self) -> float | tuple[float, ...]:
        """That of the store, by which batches are multiplied."""
        return self.store.scale

    @property
    def output_scale(self) -> float:
        """That of the store's targets; 1 where there are none."""
        return self.store.output_scale

    def calibration_batches(self, n: int) -> range:
        """Numbers of the n batches that the threshold is calibrated on: the first."""
        return range(n)

    def reading_ahead(self) -> AbstractContextManager[None]:
        """Nothing is: shards are read when their first batch is asked for."""
        return nullcontext()

    def check_room(self) -> None:
        """Shards are read into what memory there is."""

    def state_dict(self) -> None:
        """No place: it is asked for the batch of a step."""

    def batches_per_epoch(self, epoch: int) -> int:
        return min(sum(count for _, count in groups) for groups in self._plan(epoch))

    def batch(self, t: int) -> Tensor:
        """The part of batch t >= 0 that is asked for: [n, d], times the store's scale; [batch_size, d] for one of one.

        Raises:
            ValueError: a corrupt shard, or NaN or inf in the batch, with the step.
        """
        step, epoch = t, 0
        while t >= self.batches_per_epoch(epoch):
            t -= self.batches_per_epoch(epoch)
            epoch += 1
        parts = [self._rows(epoch, *of, t) for of in of_lanes(self.batch_size, self.lanes, self.rows)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        check_finite(x, "activations", f" at step {step}")
        return x

    def _rows(self, epoch: int, lane: int, start: int, stop: int, t: int) -> Tensor:
        """Tokens start to stop of what a lane gives to batch t of an epoch."""
        group, groups = 0, self._plan(epoch)[lane]
        while t >= groups[group][1]:
            t -= groups[group][1]
            group += 1
        begin = t * self._size(lane)
        return self._group(epoch, lane, group)[begin + start : begin + stop]

    def _size(self, lane: int) -> int:
        first, end = share(self.batch_size, lane, self.lanes)
        return end - first

    def _plan(self, epoch: int) -> list[list[Group]]:
        """The epoch's groups, lane by lane."""
        if epoch not in self._plans:
            tokens = self.store.tokens
            order = torch.randperm(len(tokens), generator=self._generator(epoch, 0)).tolist()
            self._plans[epoch] = [
                self._grouped(_stretch(order, tokens, *share(sum(tokens), lane, self.lanes)), self._size(lane))
                for lane in range(self.lanes)
            ]
        return self._plans[epoch]

    def _grouped(self, pieces: list[Piece], size: int) -> list[Group]:
        width = self.store.width_in + (self.store.d_out or 0)
        limit = max(GROUP_BYTES // (4 * width * self.lanes), size)
        groups: list[list[Piece]] = [[]]
        for piece in pieces:
            held = _tokens(groups[-1])
            if held >= size and held + _tokens([piece]) > limit:
                groups.append([])
            groups[-1].append(piece)
        return [(group, _tokens(group) // size) for group in groups]

    def _group(self, epoch: int, lane: int, group: int) -> Tensor:
        """The group's tokens in their shuffled order; one group of a lane is held at a time."""
        if self._loaded.get(lane, (None,))[0] != (epoch, group):
            self._loaded.pop(lane, None)
            pieces = self._plan(epoch)[lane][group][0]
            x = torch.cat([self.store.shard(*piece) for piece in pieces]).mul_(self.store.row_scale)
            order = torch.randperm(len(x), generator=self._generator(epoch, 1 + group * self.lanes + lane))
            self._loaded[lane] = (epoch, group), x[order]
        return self._loaded[lane][1]

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + part) % 2**64)


def _stretch(order: list[int], tokens: list[int], start: int, stop: int) -> list[Piece]:
    """Tokens start to stop of the shards in an order."""
    pieces, before = [], 0
    for shard in order:
        first, end = max(start - before, 0), min(stop - before, tokens[shard])
        if first < end:
            pieces.append((shard, first, end))
        before += tokens[shard]
    return pieces


def _tokens(pieces: list[Piece]) -> int:
    return sum(end - first for _, first, end in pieces)


def of_lanes(batch_size: int, lanes: int, rows: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Which tokens of which lanes the tokens `rows`, (start, stop), of a batch are: (lane, start, stop).

    Lanes are the equal parts of every batch, each of which is read, shuffled and gone on with by itself. Whichever of
    the processes reads which of them, the batches are the same.
    """
    for lane in range(lanes):
        first, end = share(batch_size, lane, lanes)
        start, stop = max(first, rows[0]), min(end, rows[1])
        if start < stop:
            yield lane, start - first, stop - first
