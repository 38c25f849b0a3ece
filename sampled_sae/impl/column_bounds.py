"""Between what and what the scores of the columns lie, and who is among the largest all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..support.nth_largest import largest_mask, nth_largest
from .rounded_tokens import Looks

# more undecided columns than this share of all cost more than they save
MOST_UNDECIDED = 1 / 4
# processes whose sums over the tokens are added up, at most, where bounds have to know how often that rounds
MOST_PARTS = 1024


class ColumnBounds(NamedTuple):
    """low, high: [F], of each column's score. exact: of some columns, int64 [U], in full precision.

    looks: where it is counted how many of them that is.
    """

    low: Tensor
    high: Tensor
    exact: Callable[[Tensor], Tensor]
    looks: Looks

    def of_features(self, features: Tensor) -> ColumnBounds:
        """Of some columns, int64 [U], which are counted from 0 then."""
        low, high = self.low[features], self.high[features]
        return ColumnBounds(low, high, lambda at: self.exact(features[at]), self.looks)


class DecidedColumns(Protocol):
    """Bounds from which the device chooses columns and tells the host nothing."""

    @property
    def low(self) -> Tensor: ...

    @property
    def high(self) -> Tensor: ...

    def settled(self, low: Tensor, high: Tensor, size: int) -> Tensor:
        """[F]: scores whose `size` largest are those of the columns, ranked by what `low` and `high` bound."""
        ...

    def largest(self, size: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The `size` columns, below F, of highest score, or of highest ln(score) + noise [F]: int64 ascending; and
        which of them are meant where more are named, bool, or None for all."""
        ...


# of a column that fires for no token, may fire, surely does, and of which nothing is known: of parts the greatest holds
NEVER, MAY, DOES, UNKNOWN = range(4)


class SeenColumns(NamedTuple):
    """Columns of some tokens, seen roughly.

    numbers: float32 sums, to which those of other tokens are added, NaN where nothing is known; or flags, uint8 [F].
    bounds: of numbers of all tokens, from what they are at least and at most, the (least, greatest) score of each
    column, [F] each.
    """

    numbers: Tensor
    bounds: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def are_flags(self) -> bool:
        return self.numbers.dtype == torch.uint8


def flags_of(does: Tensor, may: Tensor) -> Tensor:
    """uint8, from bool of the same shape."""
    return may.to(torch.uint8).masked_fill_(does, DOES)


def bounds_of_flags(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Of the score "uniform", float32 [F] each: 1 where a column fires, else 0."""
    return (least == DOES).float(), (most > NEVER).float().masked_fill_(most == UNKNOWN, torch.inf)


def largest_columns(
    bounds: ColumnBounds, size: int, keys: Callable[[Tensor], Tensor] = lambda scores: scores
) -> Tensor | None:
    """The `size` columns of highest key, int64 ascending; ties to the lower one. None where too many are open.

    Args:
        keys: of scores [F], element by element; they rise with the scores.
    """
    low, high = keys(bounds.low), keys(bounds.high)
    if size >= len(low):
        return torch.arange(len(low), device=low.device)
    sure = low > nth_largest(high, size + 1)
    undecided = (~sure & ~(high < nth_largest(low, size))).nonzero().squeeze(1)
    unknown = undecided[(bounds.low < bounds.high)[undecided]]
    too_many = len(unknown) > MOST_UNDECIDED * len(low)
    bounds.looks.see_columns(len(low), len(low) if too_many else len(unknown))
    if too_many:
        return None
    scores = bounds.low.clone()
    scores[unknown] = bounds.exact(unknown)
    taken = largest_mask(keys(scores)[undecided], size - int(sure.sum()))
    sure[undecided[taken]] = True
    return sure.nonzero().squeeze(1)
