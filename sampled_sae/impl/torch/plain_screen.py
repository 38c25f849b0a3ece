"""Which activations may lie above the floor of their feature, where bfloat16 holds weights and tokens as they are.

Then their bfloat16 product is off by the rounding of its sums alone, which the largest weight bounds well enough for a
whole chunk. The weights are read and never copied; only the product's own rounding widens the floors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .column_filter import places_reaching, rows_reaching
from .products import parts_of
from .screen import MARGIN, UNIT, smallest_normal

# elements of weights that are multiplied at once, which stay in the cache
WEIGHT_ELEMENTS = 1 << 21
MAGNITUDE_ELEMENTS = 1 << 18
# up to so many tokens their largest product with a feature alone says whether any of them may be active
FEW_TOKENS = 256
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
    """A look at a block of tokens; the few that are far larger than the others have floors of their own."""

    def __init__(self, block: Operands) -> None:
        screen, d = block.screen, block.x.shape[1]
        assert screen is not None
        self.block, self.x = block, screen.x
        # sums of d terms, and those of one activation in float32, each in any order
        self.sums = 4 * (d + 8) * 2.0**-24
        self.slack = MARGIN * (screen.errors + self.sums * screen.norms)
        self.common = min(MOST_LARGER * float(self.slack.median()), float(self.slack.amax()))
        self.larger = (self.slack > self.common).nonzero().squeeze(1)

    def places(self, span: slice, floor: Tensor) -> Tensor | None:
        """int64 [n]: where a chunk [B, C], flat, may lie above its floor, [1] or [C]; None out of range."""
        block, b, d = self.block, self.block.b[span], self.block.x.shape[1]
        # few tokens are multiplied by features, not features by tokens: what is read but once needs no copy
        by_feature = block.n_tokens <= FEW_TOKENS
        z = scratch(block.W, *((len(b), block.n_tokens) if by_feature else (block.n_tokens, len(b))))
        norm = 0.0
        for at, columns in parts_of(span, d, WEIGHT_ELEMENTS):
            W = block.W[at]
            if by_feature:
                torch.mm(W, self.x.t(), out=z[columns])
            else:
                torch.mm(self.x, W.t(), out=z[:, columns])
            # read again while they are in the cache
            largest = d**0.5 * largest_magnitude(W)
            if not largest < LARGEST:
                return None
            norm = max(norm, largest)
        floor = floor.expand(len(b)) if block.scale is None else floor / block.scale[span]
        least = floor - b - self.sums * (floor.abs() + b.abs()) - smallest_normal() * (d + 8)
        # a scale of 0 gives what is above no floor
        least = torch.where(least < torch.inf, least, torch.inf)
        common = in_bfloat16(least - norm * self.common)
        if by_feature:
            features, tokens = rows_reaching(z, common)
            places, z = tokens * len(b) + features, z.t()
        else:
            places = places_reaching(z, common)
        return self._with_larger(places, z, least, norm) if len(self.larger) else places

    def _with_larger(self, places: Tensor, z: Tensor, least: Tensor, norm: float) -> Tensor:
        width = z.shape[1]
        own = in_bfloat16(least - norm * self.slack.index_select(0, self.larger)[:, None])
        row, column = (z.index_select(0, self.larger) >= own).nonzero(as_tuple=True)
        is_larger = torch.zeros(len(z), dtype=torch.bool).index_fill_(0, self.larger, True)
        others = places[is_larger.index_select(0, places // width).logical_not_()]
        return torch.cat((others, self.larger.index_select(0, row) * width + column))


def largest_magnitude(W: Tensor) -> float:
    """Of bfloat16 numbers; NaN where there is one. Their bits without sign sort as magnitudes do, and faster."""
    parts = W.view(torch.int16).split(max(1, MAGNITUDE_ELEMENTS // W.shape[1]))
    most = [torch.bitwise_and(part, 0x7FFF, out=scratch(W, *part.shape).view(torch.int16)).amax() for part in parts]
    return float(torch.stack(most).amax().view(torch.bfloat16))


def in_bfloat16(least: Tensor) -> Tensor:
    """What a number that is at least this much is not below, when both are rounded to bfloat16."""
    return (least - UNIT * least.abs()).bfloat16()
