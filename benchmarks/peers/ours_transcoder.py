"""A skip transcoder of ours with RowAdam, which begins as a training by `Trainer` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Setup, TranscoderWeights
from benchmarks.peers.ours import Begun


class Library(Begun):
    """`first` is the first batch: what is read, and its targets."""

    def __init__(self, setup: Setup, first: tuple[Tensor, Tensor], optimizer: str, rule: dict[str, Any]) -> None:
        widths = {"d_in": first[0].shape[1], "d_out": first[1].shape[1]}
        super().__init__(setup, first, optimizer, **widths, skip=True, **rule)

    def tensors(self) -> TranscoderWeights:
        return TranscoderWeights(*super().tensors(), self.sae.W_skip.t())
