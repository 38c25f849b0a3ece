"""A batch in bfloat16, through which scores and searches may look before they compute in full."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# products and squares of what is larger may leave the range of float32
LARGEST = 1e15
# tokens whose norms are taken at once
ROWS = 64


class RoundedTokens:
    """Tokens [B, d] float32 in bfloat16; rounded when that is first asked for.

    Attributes:
        x: bfloat16 [B, d]. norms: float32 [B], of its rows. errors: float32 [B], norms of what the rounding changed.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens

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

    @property
    def in_range(self) -> bool:
        """Whether bounds on products of these tokens can be computed."""
        return bool((self.norms < LARGEST).all())

    def of_tokens(self, at: slice | Tensor) -> RoundedTokens:
        """The same of some of the tokens."""
        return RoundedTokens(self._tokens[at])


def row_norms(rows: Tensor) -> Tensor:
    """[B], never too small: a square below 2^-126 may be lost."""
    return torch.linalg.vector_norm(rows, dim=1) + 2.0**-62 * rows.shape[1] ** 0.5
