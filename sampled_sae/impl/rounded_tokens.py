"""A batch in bfloat16, through which scores and searches may look before they compute in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..support.reused_memory import scratch

# tokens [n, d], any of a batch, to what is multiplied: each by itself, in the dtype of the products
Prepare = Callable[[Tensor], Tensor]
# activations in a batch below which a product costs too little to be screened
FEWEST_ACTIVATIONS = 1 << 20
# tokens below which weights cost more to round than the product does (benchmarks/results/inference.md)
FEWEST_TOKENS = 256
# products and squares of what is larger may leave the range of float32
LARGEST = 1e15
# elements of tokens that are prepared at once, and whose norms are taken at once where they need not be
PIECE_ELEMENTS, MEASURED_ELEMENTS = 1 << 15, 1 << 17
# what the norm of one number may lose whose square is below 2^-126
LOST = 2.0**-62
# of both operands behind their d: what the bound and the bias ask for
COLUMNS = 4
# their rows are so many columns long, or a multiple: what CPUs multiply at once
TILE = 32


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
    """Tokens [B, d], prepared where they have to be, in bfloat16; rounded when that is first asked for.

    Attributes:
        x: bfloat16 [B, d]. norms: float32 [B], of its rows. errors: float32 [B], norms of what the rounding changed.
        columns: bfloat16 [B, width_of(d)], x, zeros and, rounded up, norms, errors, 1 and 1.
        looks: what was seen so far.
    """

    def __init__(self, tokens: Tensor, looks: Looks | None = None, prepare: Prepare | None = None) -> None:
        self._tokens, self._prepare = tokens, prepare
        self.looks = Looks() if looks is None else looks

    @cached_property
    def x(self) -> Tensor:
        if self._prepare is None:
            return self._tokens.bfloat16()
        low = self._tokens.new_empty(self._tokens.shape, dtype=torch.bfloat16)
        return prepare_into(low, self._tokens, self._prepare)

    @cached_property
    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Norms and errors; for them a few rows are rounded at a time, and not kept."""
        n_tokens, d = self._tokens.shape
        norms, errors = sizes = self._tokens.new_empty(2, n_tokens, dtype=torch.float32)
        for at, rows in prepared(self._tokens, self._prepare):
            low = scratch(norms, *rows.shape).copy_(rows.bfloat16())
            torch.linalg.vector_norm(low, dim=1, out=norms[at])
            torch.linalg.vector_norm(torch.sub(rows, low, out=low), dim=1, out=errors[at])
        sizes += LOST * d**0.5
        return norms, errors

    @property
    def norms(self) -> Tensor:
        return self._sizes[0]

    @property
    def errors(self) -> Tensor:
        return self._sizes[1]

    @cached_property
    def columns(self) -> Tensor:
        # from the tokens themselves: a search by columns needs no other copy
        n_tokens, d = self._tokens.shape
        columns = self._tokens.new_empty(n_tokens, width_of(d), dtype=torch.bfloat16)
        prepare_into(columns[:, :d], self._tokens, self._prepare)
        columns[:, d:-COLUMNS], columns[:, -COLUMNS:] = 0, 1
        columns[:, -COLUMNS], columns[:, 1 - COLUMNS] = rounded_up(self.norms), rounded_up(self.errors)
        return columns

    def let_go(self) -> None:
        """Of the rounded tokens; what asks again rounds again."""
        self.__dict__.pop("x", None)
        self.__dict__.pop("columns", None)

    @property
    def in_range(self) -> bool:
        """Whether bounds on products of these tokens can be computed."""
        return bool((self.norms < LARGEST).all())

    def of_tokens(self, at: slice | Tensor) -> RoundedTokens:
        """The same of some of the tokens."""
        return RoundedTokens(self._tokens[at], self.looks, self._prepare)

    def of_features(self, features: Tensor) -> RoundedTokens:
        """The same for some of the features, int64 [P]: tokens are not of any."""
        return self


def prepared(tokens: Tensor, prepare: Prepare | None) -> Iterator[tuple[slice, Tensor]]:
    """(some tokens, prepared), a few at a time."""
    n_tokens, d = tokens.shape
    step = max(1, (MEASURED_ELEMENTS if prepare is None else PIECE_ELEMENTS) // d)
    for start in range(0, n_tokens, step):
        at = slice(start, min(start + step, n_tokens))
        yield at, tokens[at] if prepare is None else prepare(tokens[at])


def prepare_into(out: Tensor, tokens: Tensor, prepare: Prepare | None) -> Tensor:
    """All tokens, prepared, in the dtype of `out` [B, d]; nothing else holds all of them."""
    if prepare is None:
        return out.copy_(tokens)
    for at, rows in prepared(tokens, prepare):
        out[at] = rows
    return out


def large_enough(n_tokens: int, n_features: int, unrounded: int = 0) -> bool:
    """Whether a product of this size is worth a screen; `unrounded`: the width of weights that need no rounding.

    Of those a screen reads half the bytes that the product does, which is most of the time for few tokens.
    """
    if unrounded:
        return max(n_tokens, unrounded) * n_features >= FEWEST_ACTIVATIONS
    return n_tokens >= FEWEST_TOKENS and n_tokens * n_features >= FEWEST_ACTIVATIONS


def width_of(d: int) -> int:
    """Columns of an operand of d numbers with those of its bound."""
    return -(-(d + COLUMNS) // TILE) * TILE


def row_norms(rows: Tensor) -> Tensor:
    """[B], never too small."""
    return torch.linalg.vector_norm(rows, dim=1) + LOST * rows.shape[1] ** 0.5


def rounded_up(values: Tensor) -> Tensor:
    """values >= 0 in bfloat16, none of them smaller."""
    return (values * (1 + 2.0**-7)).bfloat16()
