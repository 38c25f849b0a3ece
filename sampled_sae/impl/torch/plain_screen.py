"""Which activations may lie above the floor of their feature, where bfloat16 holds weights and tokens as they are.

Then their bfloat16 product is off by the rounding of its sums alone, which the norms bound well. The weights are read
and never copied; only the product's own rounding widens the floors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .column_filter import places_reaching, rows_reaching
from .products import part_width, parts_of
from .screen import MARGIN, UNIT, least_products, norms_into, smallest_normal, sums_of

# elements of weights that are multiplied at once, which stay in the cache, and features at most: two threads share
# products of these shapes, and narrower ones where tokens are fewer
WEIGHT_ELEMENTS, MOST_TOGETHER = 3 << 17, 512
MANY_TOKENS = 768
# up to so many tokens their largest product with a feature alone says whether any of them may be active, and more
# weights are multiplied at once
FEW_TOKENS, MORE_WEIGHT_ELEMENTS = 256, 1 << 20
# of the largest norm of a token: what rounding tokens to bfloat16 may have changed
MOST_CHANGED = 2.0**-20
# times the median of the tokens: what one floor serves
MOST_LARGER = 4


def is_plain(operands: Operands) -> bool:
    """Whether weights and tokens are those of their bfloat16 product."""
    if operands.W.dtype != torch.bfloat16 or operands.screen is None:
        return False
    return bool(operands.screen.errors.amax() <= MOST_CHANGED * operands.screen.norms.amax())


class PlainScreen:
    """A look at a block of tokens for activations above their floors, [1] or [F]; the few tokens that are far larger
    than the others have floors of their own.

    part: features that are multiplied at once.
    """

    def __init__(self, block: Operands, floor: Tensor) -> None:
        screen, d = block.screen, block.x.shape[1]
        assert screen is not None
        self.block, self.floor, self.x = block, floor, screen.x
        # few tokens are multiplied by features, not features by tokens: what is read but once needs no copy
        self.by_feature = block.n_tokens <= FEW_TOKENS
        if self.by_feature:
            self.part = part_width(d, MORE_WEIGHT_ELEMENTS, MORE_WEIGHT_ELEMENTS)
        else:
            self.part = part_width(d, WEIGHT_ELEMENTS, MOST_TOGETHER if block.n_tokens >= MANY_TOKENS else 0)
        # sums of d terms, and those of one activation in float32, each in any order
        self.sums = sums_of(d + 4)
        self.slack = MARGIN**2 * (screen.errors + self.sums * screen.norms)
        self.common = min(MOST_LARGER * float(self.slack.median()), float(self.slack.amax()))
        self.larger = (self.slack > self.common).nonzero().squeeze(1)

    def places(self, span: slice) -> tuple[Tensor, Tensor] | None:
        """int64 [n]: (token, feature) of those of a span that may lie above their floor; None out of range."""
        block, d = self.block, self.block.x.shape[1]
        least, sizes = least_products(block, self.floor, span)
        least = least - self.sums * sizes - smallest_normal() * (d + 8)
        z = scratch(self.x, *((len(least), block.n_tokens) if self.by_feature else (block.n_tokens, len(least))))
        norms = torch.empty_like(least)
        for at, columns in parts_of(span, self.part):
            W = block.W[at]
            if self.by_feature:
                torch.mm(W, self.x.t(), out=z[columns])
            else:
                torch.mm(self.x, W.t(), out=z[:, columns])
            # read again while they are in the cache
            norms_into(norms[columns], W)
        if not float(norms.amax()) < LARGEST:
            return None
        common = in_bfloat16(least - norms * self.common)
        if self.by_feature:
            features, tokens = rows_reaching(z, common)
            z = z.t()
        else:
            tokens, features = places_reaching(z, common)
        if len(self.larger):
            tokens, features = self._with_larger(tokens, features, z, least, norms)
        return tokens, features + span.start

    def _with_larger(
        self, tokens: Tensor, features: Tensor, z: Tensor, least: Tensor, norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = in_bfloat16(least - norms * self.slack.index_select(0, self.larger)[:, None])
        row, column = (z.index_select(0, self.larger) >= own).nonzero(as_tuple=True)
        is_larger = torch.zeros(len(z), dtype=torch.bool).index_fill_(0, self.larger, True)
        others = is_larger.index_select(0, tokens).logical_not_()
        return torch.cat((tokens[others], self.larger.index_select(0, row))), torch.cat((features[others], column))


def in_bfloat16(least: Tensor) -> Tensor:
    """What a number that is at least this much is not below, when both are rounded to bfloat16."""
    return (least - UNIT * least.abs()).bfloat16()
