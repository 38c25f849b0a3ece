"""Sums, extremes and means over a batch: of one process here, of several in `sampled_sae.distributed`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes
from .encoder import Operands


class Totals:
    """Over the tokens and features of this process, which holds them all."""

    def mean(self, per_token: Tensor, operands: Operands) -> Tensor:
        """Of one number a token, [B]: 0-dim; of several, [B, G]: [G]."""
        return per_token.mean(0)

    def smallest(self, codes: SparseCodes) -> Tensor:
        """The smallest kept activation, 0-dim; inf where nothing is kept."""
        return codes.smallest()

    def once(self, x: Tensor) -> Tensor:
        """x, which serves what processes that hold other features compute alike: one of them alone has its gradient."""
        return x

    def count(self, codes: SparseCodes) -> int:
        """Number of kept entries."""
        return codes.count()

    def active_mask(self, codes: SparseCodes, members: Tensor | None) -> Tensor:
        """bool [F]: the features with at least one kept entry, all of which are among `members`, int64 [P]."""
        return codes.active_mask()

    def greatest(self, counts: Tensor) -> Tensor:
        """Of counts, one a feature: 0-dim."""
        return counts.amax()

    def sum_of_tokens(self, t: Tensor) -> Tensor:
        """Of [B, ...] over the tokens."""
        return t.sum(0)

    def max_of_tokens(self, t: Tensor) -> Tensor:
        """Of [B], 0-dim."""
        return t.amax()

    def norm(self, norms: dict[str, Tensor]) -> Tensor:
        """The global norm of a gradient from that of each parameter, 0-dim."""
        return torch.linalg.vector_norm(torch.stack(list(norms.values())))
