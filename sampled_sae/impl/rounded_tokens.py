"""A batch in bfloat16, through which scores and searches may look before they compute in full."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# products and squares of what is larger may leave the range of float32
LARGEST = 1e15
# tokens whose norms are taken at once
ROWS = 64
# of both operands behind their d: what the bound and the bias ask for
COLUMNS = 4


class Looks:
    """What the screen saw of one batch: how many columns and entries, and how many of them it left undecided.

    What a device counts stays there, one element of a tensor, until `shares` asks for it.
    """

    def __init__(self) -> None:
        self.columns = self.entries = 0
        self.open_columns: int | Tensor = 0
        self.open_entries: int | Tensor = 0

    def see_columns(self, seen: int, undecided: int | Tensor) -> None:
        self.columns, self.open_columns = self.columns + seen, added(self.open_columns, undecided)

    def see_entries(self, seen: int, undecided: int | Tensor) -> None:
        self.entries, self.open_entries = self.entries + seen, added(self.open_entries, undecided)

    def shares(self) -> dict[str, float]:
        """Of the columns and of the entries those that were computed again; none of what it did not see."""
        found = {"columns": (self.open_columns, self.columns), "entries": (self.open_entries, self.entries)}
        return {name: float(undecided) / seen for name, (undecided, seen) in found.items() if seen}


def added(count: int | Tensor, more: int | Tensor) -> int | Tensor:
    """The sum; nothing is launched for the first one of a device."""
    return more if isinstance(count, int) and count == 0 else count + more


class RoundedTokens:
    """Tokens [B, d] float32 in bfloat16; rounded when that is first asked for.

    Attributes:
        x: bfloat16 [B, d]. norms: float32 [B], of its rows. errors: float32 [B], norms of what the rounding changed.
        columns: bfloat16 [B, d + COLUMNS], x and, rounded up, norms, errors, 1 and 1. looks: what was seen so far.
    """

    def __init__(self, tokens: Tensor, looks: Looks | None = None) -> None:
        self._tokens = tokens
        self.looks = Looks() if looks is None else looks

    @cached_property
    def x(self) -> Tensor:
        return self._tokens.bfloat16()

    @cached_property
    def norms(self) -> Tensor:
        return torch.cat([row_norms(rows.float()) for rows in self.x.split(ROWS)])

    @cached_property
    def errors(self) -> Tensor:
        parts = zip(self._tokens.split(ROWS), self.x.split(ROWS))
        return torch.cat([row_norms(tokens - rows.float()) for tokens, rows in parts])

    @cached_property
    def columns(self) -> Tensor:
        columns = self.x.new_ones(self.x.shape[0], self.x.shape[1] + COLUMNS)
        columns[:, :-COLUMNS] = self.x
        columns[:, -COLUMNS], columns[:, 1 - COLUMNS] = rounded_up(self.norms), rounded_up(self.errors)
        return columns

    @property
    def in_range(self) -> bool:
        """Whether bounds on products of these tokens can be computed."""
        return bool((self.norms < LARGEST).all())

    def of_tokens(self, at: slice | Tensor) -> RoundedTokens:
        """The same of some of the tokens."""
        return RoundedTokens(self._tokens[at], self.looks)

    def of_features(self, features: Tensor) -> RoundedTokens:
        """The same for some of the features, int64 [P]: tokens are not of any."""
        return self


def row_norms(rows: Tensor) -> Tensor:
    """[B], never too small: a square below 2^-126 may be lost."""
    return torch.linalg.vector_norm(rows, dim=1) + 2.0**-62 * rows.shape[1] ** 0.5


def rounded_up(values: Tensor) -> Tensor:
    """values >= 0 in bfloat16, none of them smaller."""
    return (values * (1 + 2.0**-7)).bfloat16()
