"""Batches of a store in a shuffled order; several SAEs share them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..support.all_ranks import ALONE, AllRanks
from ..support.argument_checks import check_device, check_finite, check_integer
from .activation_stream import StreamedActivations
from .activations import Activations
from .streamed_batches import StreamedBatches
from .training_batch import TrainingBatch

CALIBRATION_TOKENS = 65_536
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
        self.rows = _share(self.batch_size, *part)
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
        parts = []
        for lane in range(self.lanes):
            first, end = _share(self.batch_size, lane, self.lanes)
            start, stop = max(first, self.rows[0]), min(end, self.rows[1])
            if start < stop:
                parts.append(self._rows(epoch, lane, t, start - first, stop - first))
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        check_finite(x, "activations", f" at step {step}")
        return x

    def _rows(self, epoch: int, lane: int, t: int, start: int, stop: int) -> Tensor:
        """Tokens start to stop of what a lane gives to batch t of an epoch."""
        group, groups = 0, self._plan(epoch)[lane]
        while t >= groups[group][1]:
            t -= groups[group][1]
            group += 1
        begin = t * self._size(lane)
        return self._group(epoch, lane, group)[begin + start : begin + stop]

    def _size(self, lane: int) -> int:
        first, end = _share(self.batch_size, lane, self.lanes)
        return end - first

    def _plan(self, epoch: int) -> list[list[Group]]:
        """The epoch's groups, lane by lane."""
        if epoch not in self._plans:
            tokens = self.store.tokens
            order = torch.randperm(len(tokens), generator=self._generator(epoch, 0)).tolist()
            self._plans[epoch] = [
                self._grouped(_stretch(order, tokens, *_share(sum(tokens), lane, self.lanes)), self._size(lane))
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


def _share(n: int, which: int, of: int) -> tuple[int, int]:
    """(start, stop) of one of so many parts of n things, equal up to one."""
    return n * which // of, n * (which + 1) // of


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


class Feed:
    """What training reads from: the batches of a ShuffledStream or of StreamedBatches, moved to the device of the SAEs.

    The last batch is kept, so that several SAEs of one process read, move and measure it once. Of several ranks each
    reads an equal part of a batch; those of one feature dimension, which need the same tokens, exchange theirs.

    Args:
        store: the activations, or a part of a stream.
        batch_size, seed, lanes: as in ShuffledStream.
        device: where the batches go.
        ranks: the processes that share the batches.
        steps: how many batches are asked for; a stream is read no further.

    Raises:
        ValueError: a batch_size above the store's tokens, a device that is not there, a stream for several processes
            or without `steps`.
    """

    def __init__(
        self,
        store: Activations | StreamedActivations,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        ranks: AllRanks = ALONE,
        lanes: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.device = check_device(device)
        self.store, self.ranks = store, ranks
        lanes = ranks.size if lanes is None else lanes
        self.stream: ShuffledStream | StreamedBatches
        if isinstance(store, Activations):
            self.stream = ShuffledStream(store, batch_size, seed, lanes, (ranks.rank, ranks.size))
        elif ranks.size > 1 or lanes != 1:
            raise ValueError(
                f"{store.where}: a stream is read by one process in one lane, here are {ranks.size} and {lanes}; "
                "harvest it into a store, which several share"
            )
        elif steps is None:
            raise ValueError(f"steps=None: must be how many batches {store.where} is read for")
        else:
            self.stream = StreamedBatches(store, batch_size, seed, steps)
        self._last: tuple[int, TrainingBatch] | None = None

    def batch(self, t: int) -> TrainingBatch:
        """Batch t of the stream."""
        if self._last is None or self._last[0] != t:
            # The batch is a view of its group of shards; released first, the next group takes the memory of this one.
            self._last = None
            x = self._whole(self._moved(self.stream.batch(t)))
            d_in = self.store.d_in if self.d_out is not None else None
            self._last = t, TrainingBatch(x, self.ranks, self.stream.batch_size, d_in)
        return self._last[1]

    def calibration(self) -> Tensor:
        """This rank's of `CALIBRATION_TOKENS` of the stream at most, times its scale: [n, d]."""
        self._last = None
        size = self.stream.batch_size
        batches = self.stream.calibration_batches(-(-CALIBRATION_TOKENS // size))
        x = [self._whole(self._moved(self.stream.batch(t))) for t in batches]
        beyond = (len(batches) - 1) * size + self._rows()[0] - CALIBRATION_TOKENS
        x[-1] = x[-1][: max(0, -beyond)]
        return torch.cat(x)[:, : self.store.width_in]

    @property
    def d_out(self) -> int | None:
        """Width of the targets; None where there are none."""
        return self.store.d_out

    @property
    def output_scale(self) -> float:
        """What the targets are multiplied by."""
        return self.stream.output_scale

    @property
    def scale(self) -> float | tuple[float, ...]:
        """What the activations are multiplied by, one number a layer where there are several; of a stream that begins
        its first block is read for it."""
        return self.stream.scale

    @property
    def about(self) -> dict[str, Any]:
        """The manifest of the activations, with their scale."""
        return {**self.store.manifest, "scale": list(self.scale) if isinstance(self.scale, tuple) else self.scale}

    @property
    def stream_place(self) -> dict[str, Any] | None:
        """What a checkpoint holds of a stream; None for activations that can be read in any order."""
        return self.stream.state_dict() if isinstance(self.stream, StreamedBatches) else None

    def begin_at(self, where: str, place: dict[str, Any] | None) -> None:
        """Takes what a checkpoint holds of a stream as a place to begin with.

        Raises:
            ValueError: it has one and this is no stream, or the other way; begins with `where`.
        """
        if isinstance(self.stream, StreamedBatches) != (place is not None):
            made = "stored activations" if place is None else "a stream"
            raise ValueError(f"{where}: made with other settings (activations: was {made}); use another folder")
        if isinstance(self.stream, StreamedBatches):
            self.stream.offer(f"{where}: stream", place)

    def _rows(self) -> tuple[int, int]:
        """The tokens of a batch that this rank trains on."""
        return _share(self.stream.batch_size, *self.ranks.data)

    def _whole(self, x: Tensor) -> Tensor:
        """The tokens of all ranks along the feature dimension, from this rank's part of them."""
        mesh, (which, of) = self.ranks.mesh, self.ranks.feature
        if mesh is None or of == 1:
            return x
        first = self.ranks.rank - which
        rows = [_share(self.stream.batch_size, first + i, self.ranks.size) for i in range(of)]
        sizes = [stop - start for start, stop in rows]
        padded = x.new_zeros(max(sizes), x.shape[1])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=mesh.get_group("feature"))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def _moved(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
