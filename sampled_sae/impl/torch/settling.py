"""Candidates of a search above thresholds, computed one by one in full precision: what a screen could not rule out.

Where all tokens of a block are at hand as they are multiplied, candidates are computed by feature, many at a time: each
row of weights is read, and raised, once. Where that would take too much memory they wait for the end of the search, and
are computed by token, for which a few tokens at a time are prepared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..encoder import Operands
from ..rounded_tokens import PIECE_ELEMENTS
from .look_through import is_held
from .products import ends_of_tokens, products_by_feature, sampled_product

# candidates that wait, at most, by feature and by token; and computed together
MOST_SOON, MOST_LATE = 1 << 14, 1 << 17
MOST_TOGETHER = 1 << 14
# of what a search may hold, what tokens may take that are prepared for all of it, with those that are rounded
OF_TOKENS = 0.35


class Candidates:
    """Those of a block of tokens [T, F] that wait.

    Args:
        room: bytes that a search may hold.

    Attributes:
        count: how many wait. by_feature: how they are computed. held: bytes of the tokens that are prepared for it.
    """

    def __init__(self, block: Operands, room: float) -> None:
        self.block, self.count = block, 0
        n_bytes = 0 if block.is_exact else block.x.numel() * block.b.element_size()
        rounded = 0 if block.screen is None or is_held(block) else 2 * block.x.numel()
        self.by_feature = block.is_exact or n_bytes + rounded <= OF_TOKENS * room
        self.held = n_bytes if self.by_feature and block.screen is not None else 0
        self._waiting: list[Tensor] = []

    @property
    def are_many(self) -> bool:
        """Whether they should be computed now."""
        return self.count >= (MOST_SOON if self.by_feature else MOST_LATE)

    def add(self, tokens: Tensor, features: Tensor) -> None:
        """int64 [n] each, in any order; both are overwritten."""
        self.count += len(tokens)
        if self.by_feature:
            tokens, features = features, tokens
        self._waiting.append(flat_places(self.block, tokens, features, self._width))

    def let_go(self) -> None:
        """Of all that wait, and of the tokens."""
        self._waiting, self.count = [], 0
        self.__dict__.pop("_tokens", None)

    def products(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x . w, tokens, features) of some after others, int64 [n] the latter; then none wait."""
        waiting, self._waiting, self.count = self._waiting, [], 0
        places = torch.cat(waiting).sort().values if waiting else self.block.b.new_zeros(0)
        waiting.clear()
        for some in places.split(MOST_TOGETHER) if len(places) else ():
            rows = some // self._width
            rows, columns = rows.long(), (some - rows * self._width).long()
            if self.by_feature:
                yield products_by_feature(self._tokens, self.block.W, columns, rows), columns, rows
            else:
                yield products_by_token(self.block, rows, columns), rows, columns

    @property
    def _width(self) -> int:
        """Of a row of the flat places in which they wait: features in order, or tokens."""
        return self.block.n_tokens if self.by_feature else self.block.n_features

    @cached_property
    def _tokens(self) -> Tensor:
        """As they are multiplied; products want them contiguous."""
        return self.block.raised().x.contiguous()


def flat_places(block: Operands, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Places in a flat [T, F] or [F, T] of the block, in as few bytes as hold them; rows are overwritten."""
    places = rows.mul_(width).add_(columns)
    return places.int() if block.n_tokens * block.n_features < 1 << 31 else places


def products_by_token(block: Operands, tokens: Tensor, features: Tensor) -> Tensor:
    """The same of entries sorted by token, a few of which are prepared at a time."""
    ends = ends_of_tokens(tokens, block.n_tokens)
    step = max(1, PIECE_ELEMENTS // block.x.shape[1])
    bounds, parts = [*ends[::step].tolist(), len(features)], []
    for first, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            at = slice(first * step, min((first + 1) * step, block.n_tokens))
            own = ends[at.start : at.stop + 1] - start
            parts.append(sampled_product(block.exact(at), block.W, own, features[start:stop]))
    return torch.cat(parts)
