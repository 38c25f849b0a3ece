"""Batches of a store in a shuffled order; several SAEs share them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..support.argument_checks import check_device, check_finite, check_integer
from ..support.geometric_median import geometric_median
from .activation_store import ActivationStore

CALIBRATION_TOKENS = 65_536
GROUP_BYTES = 1 << 30


class ShuffledStream:
    """Batches of a store in an order that depends on (seed, batch number) alone.

    Each epoch visits the shards in a new order, in groups of up to 1 GiB that are shuffled in memory. The tokens
    left at the end of a group, fewer than a batch, are dropped. A resumed run needs no saved state: it asks for
    the batch of its step.

    Args:
        store: an ActivationStore.
        batch_size: tokens a batch.
        seed: of the order.
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int = 0) -> None:
        self.store = store
        self.batch_size, self.seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed, 0)
        self._plans: dict[int, list[tuple[list[int], int]]] = {}
        self._loaded: tuple[tuple[int, int], Tensor] | None = None
        if self.batches_per_epoch(0) == 0:
            raise ValueError(
                f"batch_size={batch_size}: must be at most {sum(store.tokens)}, the tokens in {store.folder}"
            )

    def batches_per_epoch(self, epoch: int) -> int:
        return sum(count for _, count in self._plan(epoch))

    def batch(self, t: int) -> Tensor:
        """Batch t >= 0: [batch_size, d], times the store's scale.

        Raises:
            ValueError: a corrupt shard, or NaN or inf in the batch, with the step.
        """
        step, epoch = t, 0
        while t >= self.batches_per_epoch(epoch):
            t -= self.batches_per_epoch(epoch)
            epoch += 1
        group = 0
        while t >= self._plan(epoch)[group][1]:
            t -= self._plan(epoch)[group][1]
            group += 1
        x = self._group(epoch, group)[t * self.batch_size : (t + 1) * self.batch_size]
        check_finite(x, "activations", f" at step {step}")
        return x

    def _plan(self, epoch: int) -> list[tuple[list[int], int]]:
        """The epoch's groups: (shards, full batches)."""
        if epoch not in self._plans:
            tokens = self.store.tokens
            limit = max(GROUP_BYTES // (4 * self.store.d_in), self.batch_size)
            groups: list[list[int]] = [[]]
            for shard in torch.randperm(len(tokens), generator=self._generator(epoch, 0)).tolist():
                held = sum(tokens[i] for i in groups[-1])
                if held >= self.batch_size and held + tokens[shard] > limit:
                    groups.append([])
                groups[-1].append(shard)
            self._plans[epoch] = [(g, sum(tokens[i] for i in g) // self.batch_size) for g in groups]
        return self._plans[epoch]

    def _group(self, epoch: int, group: int) -> Tensor:
        """The group's tokens in their shuffled order; one group is held at a time."""
        if self._loaded is None or self._loaded[0] != (epoch, group):
            self._loaded = None
            x = torch.cat([self.store.shard(i) for i in self._plan(epoch)[group][0]]).mul_(self.store.scale)
            order = torch.randperm(len(x), generator=self._generator(epoch, group + 1))
            self._loaded = (epoch, group), x[order]
        return self._loaded[1]

    def _generator(self, epoch: int, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + part) % 2**64)


class TrainingBatch:
    """Activations x [B, d], scaled, and what several SAEs need of them, computed once, when first asked for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def variance(self) -> float:
        """Mean over tokens of the squared distance to their mean, summed over d."""
        return float((self.x - self.x.mean(0)).square().sum(1).mean())

    @cached_property
    def median(self) -> Tensor:
        """Geometric median [d]."""
        return geometric_median(self.x)


class Feed:
    """What training reads from: the batches of a ShuffledStream, moved to the device of the SAEs.

    The last batch is kept, so that several SAEs of one process read, move and measure it once.

    Args:
        store: an ActivationStore.
        batch_size, seed: as in ShuffledStream.
        device: where the batches go.

    Raises:
        ValueError: a batch_size above the store's tokens, a device that is not there.
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = check_device(device)
        self.store = store
        self.stream = ShuffledStream(store, batch_size, seed)
        self._last: tuple[int, TrainingBatch] | None = None

    def batch(self, t: int) -> TrainingBatch:
        """Batch t of the stream."""
        if self._last is None or self._last[0] != t:
            # The batch is a view of its group of shards; released first, the next group takes the memory of this one.
            self._last = None
            self._last = t, TrainingBatch(self._moved(self.stream.batch(t)))
        return self._last[1]

    def calibration(self) -> Tensor:
        """The first tokens of the stream, at most `CALIBRATION_TOKENS`, times the store's scale: [n, d]."""
        self._last = None
        x = [self.stream.batch(t) for t in range(-(-CALIBRATION_TOKENS // self.stream.batch_size))]
        return self._moved(torch.cat(x)[:CALIBRATION_TOKENS])

    def _moved(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
