"""Batches of one store for any number of SAEs: each is fetched, moved and measured once."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .data import ActivationStore, ShuffledStream
from .init import geometric_median
from .validate import check_device

CALIBRATION_TOKENS = 65_536


class Batch:
    """Activations x [B, d] with what every SAE asks of them, computed when first asked."""

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
    """A store's shuffled batches on a device; the last one is kept, so that several SAEs share it.

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
        self._last: tuple[int, Batch] | None = None

    def batch(self, t: int) -> Batch:
        """Batch t of the stream."""
        if self._last is None or self._last[0] != t:
            # A view of the stream's group of shards: kept, it would hold them beside the next group.
            self._last = None
            self._last = t, Batch(self._moved(self.stream.batch(t)))
        return self._last[1]

    def calibration(self) -> Tensor:
        """The first tokens of the stream, at most `CALIBRATION_TOKENS`: [n, d]."""
        self._last = None
        x = [self.stream.batch(t) for t in range(-(-CALIBRATION_TOKENS // self.stream.batch_size))]
        return self._moved(torch.cat(x)[:CALIBRATION_TOKENS])

    def _moved(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
