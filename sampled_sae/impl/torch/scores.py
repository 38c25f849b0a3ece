"""Column scores of relu(x W^T + b), chunk of features by chunk of features.

2BdF FLOP in products; the activations of a chunk (about 4 MB) never leave the cache. Larger batches are taken in
blocks of tokens: a chunk of all of them would be too few features wide for a product at full rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...support.reused_memory import scratch

CHUNK_ELEMENTS = 1 << 20
BLOCK_TOKENS = 2048


def chunk_features(n_tokens: int) -> int:
    """Features a chunk: a multiple of 64 that keeps [B, C] near 1M elements."""
    return max(64, CHUNK_ELEMENTS // n_tokens // 64 * 64)


def column_statistics(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None = None) -> Tensor:
    """Sums over the tokens from which the score follows; adding those of two batches gives those of both.

    Args:
        x: [B, d] float32 or float64, centred.
        W, b, scale: [F, d], [F], [F] or None.

    Returns:
        [S, F] float: sum a^2 for l2 and l2_squared; sum a and sum a ln a for entropy; the number of
        positive entries for uniform. To be reduced across processes, then given to `finish_scores`.
    """
    stats = x.new_zeros(2 if score == "entropy" else 1, W.shape[0])
    for at, a in feature_chunks(x, W, b, scale):
        if score == "entropy":
            stats[0, at] += a.sum(1)
            stats[1, at] -= torch.special.entr(a).sum(1)
        elif score == "uniform":
            stats[0, at] += torch.count_nonzero(a, 1)
        else:
            stats[0, at] += torch.linalg.vector_norm(a, dim=1).square_()
    return stats


def threshold_counts(x: Tensor, W: Tensor, b: Tensor, thresholds: Tensor, scale: Tensor | None = None) -> Tensor:
    """How many activations lie strictly above each threshold; those of two batches add up.

    Args:
        x, W, b, scale: as for `column_statistics`.
        thresholds: [m] >= 0, ascending.

    Returns:
        int64 [m].
    """
    counts = torch.zeros(len(thresholds) + 1, dtype=torch.int64, device=x.device)
    for _, a in feature_chunks(x, W, b, scale):
        # bucketize counts the thresholds strictly below each activation.
        above = torch.bucketize(a[a > thresholds[0]], thresholds)
        counts += torch.bincount(above, minlength=len(counts))
    return counts.flip(0).cumsum(0).flip(0)[1:]


def feature_chunks(x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(features, their activations [C, T]) chunk by chunk, for one block of T tokens after another."""
    n_features = W.shape[0]
    for tokens in x.split(BLOCK_TOKENS):
        step = chunk_features(len(tokens))
        buffer = scratch(x, min(step, n_features), len(tokens))
        for start in range(0, n_features, step):
            at = slice(start, min(start + step, n_features))
            a = buffer[: at.stop - start]
            torch.addmm(b[at, None], W[at].to(x.dtype), tokens.t(), out=a).relu_()
            if scale is not None:
                a.mul_(scale[at, None])
            yield at, a


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
