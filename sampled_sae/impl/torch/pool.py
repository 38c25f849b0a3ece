"""The candidate pool from its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.nth_largest import largest_mask
from ..ranking import gumbel_keys


def candidate_pool(scores: Tensor, size: int, pool: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """The `size` features of highest score, or a draw in proportion to the score.

    Args:
        scores: [F], >= 0.
        size: P, clipped to F.
        pool: "top", ties to the lower index; "sample": without replacement, by the Gumbel top-k trick on
            ln(score), features of score 0 only after all others.
        generator: source of randomness for "sample".

    Returns:
        int64 [P], ascending. For "top" equivalent to
        `scores.sort(descending=True, stable=True).indices[:size].sort().values`.
    """
    if pool == "sample":
        scores = gumbel_keys(scores, generator)
    return largest_mask(scores, size).nonzero().squeeze(1)
