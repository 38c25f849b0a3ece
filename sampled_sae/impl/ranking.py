"""Which columns are the largest: of all features in this process here, of several in `sampled_sae.distributed`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..support.nth_largest import largest_mask
from .column_bounds import ColumnBounds, largest_columns
from .encoder import Operands
from .pool_sampling import gumbel_noise


class Ranking:
    """Among the columns of this process, which holds them all."""

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """`gumbel_noise` of each column, [F]."""
        return gumbel_noise(like, generator)

    def largest(self, keys: Tensor, size: int) -> Tensor:
        """int64, ascending: which of the keys [F] are among the `size` largest; ties to the lower one."""
        return largest_mask(keys, size).nonzero().squeeze(1)

    def has_room(self, operands: Operands, size: int) -> bool:
        """Whether a pool of so many features is to have `candidates` for members, a number that the host knows."""
        return False

    def candidates(self, keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """int64, ascending: the `size` largest of the keys here, or all; and which of them are among those of all."""
        mine = self.largest(keys, size)
        return mine, torch.ones_like(mine, dtype=torch.bool)

    def within(self, bounds: ColumnBounds, size: int, keys: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The columns of highest key, from bounds: `largest_columns`."""
        return largest_columns(bounds, size, keys)
