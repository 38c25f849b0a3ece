"""A crosscoder of ours with RowAdam, which begins as a training by `Trainer` does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.candidate import Setup
from benchmarks.peers.ours import Begun


class Library(Begun):
    """`first` is the first batch, [B, layers * d]."""

    def __init__(self, setup: Setup, first: Tensor, optimizer: str, rule: dict[str, Any]) -> None:
        super().__init__(setup, (first,), optimizer, d_in=setup.d, layers=setup.layers, **rule)
