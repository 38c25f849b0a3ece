"""`Feed`: the batches that several SAEs train on, on their device."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..impl.start import geometric_median
from ..support.all_ranks import ALONE, AllRanks
from ..support.argument_checks import check_device
from ..support.even_slices import share
from .activation_stream import StreamedActivations
from .activations import Activations
from .batches import ShuffledStream
from .streamed_batches import StreamedBatches

CALIBRATION_TOKENS = 65_536


class TrainingBatch:
    """This rank's activations x [n, d], scaled, and what several SAEs need of the whole batch, computed once.

    Args:
        rows: [n, d], or [n, d_in + d_out] with targets; along the data dimension of `ranks` each has its own tokens.
        ranks: the processes that share the batch.
        tokens: in the whole batch.
        d_in: where the targets begin in a row; None where there are none.

    Attributes:
        x, target: [n, d_in], and [n, d_out] or None. goal: what is reconstructed, of which the figures below are.
    """

    def __init__(self, rows: Tensor, ranks: AllRanks, tokens: int, d_in: int | None) -> None:
        self.x = rows if d_in is None else rows[:, :d_in].contiguous()
        self.target = None if d_in is None else rows[:, d_in:].contiguous()
        self.goal = self.x if self.target is None else self.target
        self._ranks, self._tokens = ranks, tokens

    @cached_property
    def variance(self) -> float:
        """Mean over tokens of the squared distance to their mean, summed over d."""
        mean = self._ranks.sum_(self.goal.sum(0)) / self._tokens
        return float(self._ranks.sum_((self.goal - mean).square().sum(1).sum()) / self._tokens)

    def fvu_of_layers(self, x_hat: Tensor, layers: int) -> list[float]:
        """Of each of several layers, that of its reconstruction in x_hat [n, layers * d]; none of a single one."""
        if layers == 1:
            return []
        mean = self._ranks.sum_(self.goal.sum(0)) / self._tokens
        apart = [(self.goal - other).view(-1, layers, x_hat.shape[1] // layers) for other in (x_hat, mean)]
        errors, deviations = (self._ranks.sum_(t.square().sum((0, 2))).tolist() for t in apart)
        return [error / deviation if deviation else math.nan for error, deviation in zip(errors, deviations)]

    @cached_property
    def square(self) -> float:
        """Mean over tokens of their squared length."""
        return float(self._ranks.sum_(self.goal.square().sum(1).sum()) / self._tokens)

    @cached_property
    def median(self) -> Tensor:
        """Geometric median [d]."""
        ranks = self._ranks
        return geometric_median(
            self.goal, total=lambda t: ranks.sum_(t.sum(0)), greatest=lambda t: ranks.max_(t.amax())
        )


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
        ValueError: a batch_size above the store's tokens, a device that is not there, a stream without `steps`, what
            `StreamedBatches` raises.
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
        elif steps is None:
            raise ValueError(f"steps=None: must be how many batches {store.where} is read for")
        else:
            self.stream = StreamedBatches(store, batch_size, seed, steps, lanes, ranks)
        self._last: tuple[int, TrainingBatch] | None = None

    def batch(self, t: int) -> TrainingBatch:
        """Batch t of the stream."""
        if self._last is None or self._last[0] != t:
            # The batch is a view of its group of shards; released first, the next group takes the memory of this one.
            self._last = None
            x = self._whole(self._moved(self.stream.batch(t)))
            d_in = self.store.d_in if self.store.d_out is not None else None
            self._last = t, TrainingBatch(x, self.ranks, self.stream.batch_size, d_in)
        return self._last[1]

    def calibration(self) -> Tensor:
        """This rank's of `CALIBRATION_TOKENS` of the stream at most, times its scale: [n, d]."""
        self._last = None
        size = self.stream.batch_size
        batches = self.stream.calibration_batches(-(-CALIBRATION_TOKENS // size))
        x = [self._whole(self._moved(self.stream.batch(t))) for t in batches]
        beyond = (len(batches) - 1) * size + share(size, *self.ranks.data)[0] - CALIBRATION_TOKENS
        x[-1] = x[-1][: max(0, -beyond)]
        return torch.cat(x)[:, : self.store.width_in]

    def first_tokens(self, n: int) -> Tensor:
        """The first n tokens of the training, whichever rank trains on them, times the scale, on the CPU: [n, d], of
        fewer where the activations are; not of a stream."""
        assert isinstance(self.store, Activations)
        size = self.stream.batch_size
        whole = ShuffledStream(self.store, size, self.stream.seed, self.stream.lanes)
        n = min(n, size * whole.batches_per_epoch(0))
        return torch.cat([whole.batch(t) for t in range(-(-n // size))])[:n, : self.store.width_in]

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
    def data(self) -> Any:
        """What tells the activations from others of the same place: the shards, or the settings of a stream."""
        return self.store.manifest["settings" if self.is_streamed else "shards"]

    @property
    def is_streamed(self) -> bool:
        """Whether it reads a stream, whose place a checkpoint holds."""
        return isinstance(self.store, StreamedActivations)

    def begin_at(self, where: str, place: dict[str, Any] | None) -> None:
        """Takes what a checkpoint holds of a stream as a place to begin with.

        Raises:
            ValueError: it has one and this is no stream, or the other way; begins with `where`.
        """
        if self.is_streamed != (place is not None):
            made = "stored activations" if place is None else "a stream"
            raise ValueError(f"{where}: made with other settings (activations: was {made}); use another folder")
        if isinstance(self.stream, StreamedBatches):
            self.stream.offer(f"{where}: stream", place)

    def _whole(self, x: Tensor) -> Tensor:
        """The tokens of all ranks along the feature dimension, from this rank's part of them."""
        mesh, (which, of) = self.ranks.mesh, self.ranks.feature
        if mesh is None or of == 1:
            return x
        first = self.ranks.rank - which
        rows = [share(self.stream.batch_size, first + i, self.ranks.size) for i in range(of)]
        sizes = [stop - start for start, stop in rows]
        padded = x.new_zeros(max(sizes), x.shape[1])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=mesh.get_group("feature"))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def _moved(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
