"""The candidate pool of a batch: steps 2 and 3 of METHOD.md, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import pool_size
from ..support.cuda_graphs import capturing
from .interface import Implementation


class Pool(NamedTuple):
    """members: int64 [P], ascending. scores: [F], from which they were chosen."""

    members: Tensor
    scores: Tensor


class KeptPool:
    """Serves one pool for `every` steps before it looks for the next."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.reset()

    def reset(self) -> None:
        """The next step looks for a new pool."""
        self._pool: Pool | None = None
        self._uses = 0

    def next(self, find: Callable[[], Pool | None]) -> Pool | None:
        """The pool of one more step.

        Raises:
            RuntimeError: where a CUDA graph is being captured and `every` is not 1.
        """
        if self.every == 1:
            return find()
        if capturing():
            raise RuntimeError(f"pool_every={self.every}: every replay of a CUDA graph would use one pool; must be 1")
        if self._pool is None or self._uses == self.every:
            self._pool, self._uses = find(), 0
        self._uses += 1
        return self._pool

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: tensors and a number; empty where nothing is kept."""
        if self._pool is None:
            return {}
        return {**self._pool._asdict(), "uses": self._uses}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """The inverse of `state_dict`."""
        self.reset()
        if state:
            self._pool = Pool(state["members"].to(device), state["scores"].to(device))
            self._uses = state["uses"]


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
