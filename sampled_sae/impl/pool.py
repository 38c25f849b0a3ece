"""The candidate pool of a batch: steps 2 and 3 of docs/method.md, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import pool_size
from ..support.cuda_graphs import capturing
from .column_bounds import ColumnBounds, DecidedColumns
from .encoder import Encoder, Operands
from .interface import Implementation
from .ranking import keys_of

# batches without a screen after one that it did not help
REST = 64


class PoolRule(NamedTuple):
    """Which features are candidates; see `SampledSAEConfig` for what each field means."""

    k: float
    l: float | None
    score: str = "l2"
    pool: str = "top"
    score_tokens: float = 1.0

    @classmethod
    def of(cls, config: Any) -> PoolRule:
        """From anything that has these fields."""
        return cls(config.k, config.l, config.score, config.pool, config.score_tokens)


class Pool(NamedTuple):
    """members: int64 [P], ascending. scores: [F], from which they were chosen, or bounds that were enough to do so.

    taken: bool [P], which of the members belong to the pool; None for all. Others fill its room, where features are
    spread over processes and none may wait for how many of a pool it has.
    """

    members: Tensor
    scores: Tensor | ColumnBounds | DecidedColumns
    taken: Tensor | None = None

    def of(self, encoder: Encoder) -> Encoder:
        """The encoder, for a selection among the members: those that only fill room are never active."""
        if self.taken is None:
            return encoder
        some = torch.zeros(encoder.shape[1], dtype=torch.bool, device=self.taken.device)
        return encoder.only(some.index_copy_(0, self.members, self.taken))


class KeptPool:
    """Serves one pool for `every` steps before it looks for the next."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rest = 0
        self.reset()

    def reset(self) -> None:
        """The next step looks for a new pool."""
        self._pool: Pool | None = None
        self._uses = 0

    def find(
        self, parts: Implementation, operands: Operands, rule: PoolRule, generator: torch.Generator | None = None
    ) -> Pool | None:
        """`find_pool`, with a screen where it is worth one.

        Not for REST batches after one of which it left too much open, and not for a pool that is kept, of whose scores
        a later step may rank others.
        """
        if self.every > 1 or self.rest > 0:
            self.rest = max(0, self.rest - 1)
            operands = operands.in_full()
        pool = find_pool(parts, operands, rule, generator)
        # entropy is never screened
        bounded = operands.screen is not None and rule.score != "entropy"
        if bounded and pool is not None and isinstance(pool.scores, Tensor):
            self.rest = REST
        return pool

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
        """What a checkpoint needs: tensors and numbers; empty where nothing is kept."""
        pool = {} if self._pool is None else self._pool._asdict()
        kept = {name: value for name, value in pool.items() if value is not None}
        kept |= {"uses": self._uses} if kept else {}
        return {**kept, "rest": self.rest} if self.rest else kept

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str) -> None:
        """The inverse of `state_dict`."""
        self.reset()
        self.rest = state.get("rest", 0)
        if "members" in state:
            taken = state.get("taken")
            taken = None if taken is None else taken.to(device)
            self._pool = Pool(state["members"].to(device), state["scores"].to(device), taken)
            self._uses = state["uses"]


def find_pool(
    parts: Implementation, operands: Operands, rule: PoolRule, generator: torch.Generator | None = None
) -> Pool | None:
    """The pool of a batch; None where it would be the whole dictionary.

    Where the operands have a screen, only the columns whose rank it leaves open are scored in full.
    """
    size = pool_size(rule.k, rule.l, operands.whole_shape[1])
    if size == operands.whole_shape[1]:
        return None
    seen = operands if rule.score_tokens == 1 else operands.of_tokens(share_of(operands, rule.score_tokens))
    bounds = parts.column_bounds(seen, rule.score)
    if bounds is None:
        scores = parts.column_scores(seen, rule.score)
        if not parts.ranking.has_room(operands, size):
            return Pool(parts.candidate_pool(scores, size, rule.pool, generator), scores)
        keys = keys_of(scores, None if rule.pool == "top" else parts.ranking.noise(scores, generator))
        members, taken = parts.ranking.candidates(keys, size)
        return Pool(members, scores, taken)
    # drawn once, for the bounds and for the scores in full
    noise = None if rule.pool == "top" else parts.ranking.noise(bounds.low, generator)
    if not isinstance(bounds, ColumnBounds):
        chosen, of_these = bounds.largest(size, noise)
        return Pool(chosen, bounds, of_these)
    found = parts.ranking.within(bounds, size, lambda scores: keys_of(scores, noise))
    if found is not None:
        return Pool(found, bounds)
    scores = parts.column_scores(seen.in_full(), rule.score)
    return Pool(parts.ranking.largest(keys_of(scores, noise), size), scores)


def share_of(operands: Operands, share: float) -> Tensor:
    """Indices int64 of round(share * B) tokens, at least one, at even distances: neighbours may belong to one text.

    Of a batch that is spread over processes those that are here.
    """
    n_tokens = operands.whole_shape[0]
    n, first = max(1, round(share * n_tokens)), 0 if operands.share is None else operands.share.first
    # token number i is i * B // n
    start, stop = (-(-at * n // n_tokens) for at in (first, first + operands.n_tokens))
    return torch.arange(start, stop, device=operands.x.device) * n_tokens // n - first
