"""Column scores without a [B, F] tensor: step 2 of docs/method.md, from sums over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder import Operands
from .products import feature_chunks, without_autocast


@without_autocast
def column_scores(operands: Operands, score: str) -> Tensor:
    """[F], of every feature; no gradient."""
    return finish_scores(column_statistics(operands, score), score)


def column_statistics(operands: Operands, score: str) -> Tensor:
    """Sums over the tokens from which the score follows; adding those of two batches gives those of both.

    Returns:
        [S, F] float: sum a^2 for l2 and l2_squared; sum a and sum a ln a for entropy; the number of
        positive entries for uniform. To be reduced across processes, then given to `finish_scores`.
    """
    stats = operands.x.new_zeros(2 if score == "entropy" else 1, operands.n_features)
    for at, a in feature_chunks(operands):
        if score == "entropy":
            stats[0, at] += a.sum(1)
            stats[1, at] -= torch.special.entr(a).sum(1)
        elif score == "uniform":
            stats[0, at] += torch.count_nonzero(a, 1)
        else:
            # exact for whole numbers, so that ties do not depend on how tokens are spread
            stats[0, at] += a.square_().sum(1)
    return stats


def finish_scores(stats: Tensor, score: str) -> Tensor:
    """[S, F] statistics to [F] scores."""
    if score == "l2":
        return stats[0].sqrt()
    if score == "l2_squared":
        return stats[0]
    if score == "uniform":
        return (stats[0] > 0).to(stats.dtype)
    fires = stats[0] > 0
    log_total = torch.where(fires, stats[0], 1).log()
    entropy = log_total - stats[1] / torch.where(fires, stats[0], 1)
    # One token alone has entropy 0, here up to rounding; above a column that never fires all the same.
    limits = torch.finfo(stats.dtype)
    entropy = torch.where(entropy > 4 * limits.eps * (1 + log_total.abs()), entropy, limits.tiny)
    return torch.where(fires, entropy, 0)


@without_autocast
def threshold_counts(operands: Operands, thresholds: Tensor) -> Tensor:
    """How many activations lie strictly above each threshold; those of two batches add up.

    Args:
        thresholds: [m] >= 0, ascending.

    Returns:
        int64 [m].
    """
    counts = torch.zeros(len(thresholds) + 1, dtype=torch.int64, device=thresholds.device)
    for _, a in feature_chunks(operands):
        # bucketize counts the thresholds strictly below each activation.
        above = torch.bucketize(a[a > thresholds[0]], thresholds)
        counts += torch.bincount(above, minlength=len(counts))
    return counts.flip(0).cumsum(0).flip(0)[1:]
