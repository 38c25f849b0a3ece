"""The candidate pool of a batch: steps 2 and 3 of METHOD.md, the same for every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import pool_size
from .implementations import Implementation


class Pool(NamedTuple):
    """members: int64 [P], ascending. scores: [F], from which they were chosen."""

    members: Tensor
    scores: Tensor


def find_pool(
    parts: Implementation,
    centred: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    k: float,
    l: float | None,
    score: str = "l2",
    pool: str = "top",
    scale: Tensor | None = None,
    generator: torch.Generator | None = None,
    score_tokens: float = 1.0,
) -> Pool | None:
    """The pool of centred x [B, d] under W [F, d], b [F]; None where it would be the whole dictionary."""
    size = pool_size(k, l, W.shape[0])
    if size == W.shape[0]:
        return None
    scores = parts.column_scores(share_of(centred, score_tokens), W, b, score, scale)
    return Pool(parts.candidate_pool(scores, size, pool, generator), scores)


def share_of(x: Tensor, share: float) -> Tensor:
    """round(share * B) tokens, at least one, at even distances: neighbours may belong to one text."""
    if share == 1:
        return x
    n = max(1, round(share * len(x)))
    return x.index_select(0, torch.arange(n, device=x.device) * len(x) // n)
