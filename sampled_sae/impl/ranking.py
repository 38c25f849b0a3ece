"""Which columns are the largest, or drawn in proportion to their scores: Gumbel top-k.

Of all features in this process here, of several in `sampled_sae.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..support.cuda_graphs import capturing
from ..support.nth_largest import largest_mask
from .column_bounds import ColumnBounds, largest_columns
from .encoder import Operands


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


def gumbel_keys(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """float64 [F], whose largest are a draw without replacement in proportion to the scores."""
    return keys_of(scores, gumbel_noise(scores, generator))


def keys_of(scores: Tensor, noise: Tensor | None) -> Tensor:
    """[F], whose largest are the pool: the scores, or with the noise of a draw, float64 [F], its keys."""
    return scores if noise is None else scores.double().log() + noise


def gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """-ln(-ln u) with u uniform: float64 in the shape and on the device of `like`."""
    device = None if generator is None else generator.device
    u = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=device)
    if like.device != u.device:
        if capturing():
            raise RuntimeError('pool="sample": every replay of a CUDA graph would draw the same pool; must be "top"')
        u = u.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else u.to(like.device)
    return -(-u.log()).log()
