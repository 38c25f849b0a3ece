"""Which activations may lie above the floor of their feature, by a bound for each entry that is part of the product.

With x^ and w^ the operands in bfloat16, x_i . w_j reaches the least l_j that an activation above its floor needs only
where

    x^_i . w^_j + ||x^_i|| e_j + ||dx_i|| ||w_j|| - l_j >= 0,   e_j = ||dw_j|| + the rounding of sums,

as in screen.py. For ||dw_j|| stands what rounding may do to such a row: to measure it costs more than the few entries
that it would save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import COLUMNS, LARGEST, LOST, width_of
from .column_filter import places_reaching
from .products import part_width, parts_of
from .screen import MARGIN, UNIT, in_two_pieces, least_products, norms_into, offset_errors, sums_of

# elements of weights that are rounded and multiplied at once, and features at most, for few tokens twice as many: they
# stay in the cache, and two threads share products of these shapes
WEIGHT_ELEMENTS, MOST_TOGETHER = 3 << 17, 384
FEW_TOKENS = 384
# features whose bias and floor are brought together at once
AT_ONCE = 1 << 14


class BoundedScreen:
    """A look at a block of tokens for activations above their floors, [1] or [F].

    part: features that are multiplied at once.
    """

    def __init__(self, block: Operands, floor: Tensor) -> None:
        assert block.screen is not None
        d = block.x.shape[1]
        self.block, self.floor, self.tokens = block, floor, block.screen.columns
        times = 2 if block.n_tokens <= FEW_TOKENS else 1
        self.part = part_width(d, times * WEIGHT_ELEMENTS, times * MOST_TOGETHER)
        # of ||w_j||, before it is rounded up to bfloat16: what x^ . w^ moves by for ||x^|| = 1, and for ||dx|| = 1
        unit, sums = 0.0 if block.W.dtype == torch.bfloat16 else UNIT, sums_of(width_of(d))
        errors = MARGIN * (unit + sums * (1 + unit) + LOST), MARGIN
        self.factors = block.b.new_tensor([(1 + 2.0**-7) * error for error in errors])
        self.first, self.offsets, self.in_range = 0, self.tokens.new_empty(0, 2), True
        self.low = self.tokens[:0]

    def places(self, span: slice) -> tuple[Tensor, Tensor] | None:
        """int64 [n]: (token, feature) of those of a span that may lie above their floor; None out of range."""
        block, d, n_features = self.block, self.block.x.shape[1], span.stop - span.start
        z, norms = scratch(self.tokens, block.n_tokens, n_features), block.b.new_empty(n_features)
        for at, columns in parts_of(span, self.part):
            rows, norm = block.W[at], norms[columns]
            low = self._room(len(rows))
            low[:, :d] = rows
            norms_into(norm, rows)
            low[:, -COLUMNS:-2] = norm[:, None] * self.factors
            low[:, -2:] = self._offsets_of(at)
            # the second operand is packed anew each time: that is the smaller one
            torch.mm(self.tokens, low.t(), out=z[:, columns])
        if not (self.in_range and float(norms.amax()) < LARGEST):
            return None
        tokens, features = places_reaching(z, z.new_zeros(1))
        return tokens, features.add_(span.start)

    def _offsets_of(self, at: slice) -> Tensor:
        """bfloat16 [C, 2], of some features; made for more that come after them."""
        start = at.start - self.first
        if not 0 <= start <= start + (at.stop - at.start) <= len(self.offsets):
            start, self.first = 0, at.start
            some = slice(at.start, max(at.stop, min(at.start + AT_ONCE, self.block.n_features)))
            least, sizes = least_products(self.block, self.floor, some)
            self.offsets = in_two_pieces(offset_errors(sizes, self.tokens.shape[1]) - least)
            self.in_range = self.in_range and bool((self.block.b[some].abs() < LARGEST).all())
        return self.offsets[start : start + at.stop - at.start]

    def _room(self, n: int) -> Tensor:
        """[n, width_of(d)], of which only what is the same for all features is set."""
        if len(self.low) < n:
            self.low = scratch(self.tokens, n, self.tokens.shape[1])
            self.low[:, self.block.x.shape[1] : -COLUMNS] = 0
        return self.low[:n]
