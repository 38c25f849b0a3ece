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
from .column_filter import places_reaching
from .products import features_of
from .screen import MARGIN, UNIT, smallest_normal

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
        self.block = block
        # sums of d terms, and those of one activation in float32, each in any order
        self.sums = 4 * (d + 8) * 2.0**-24
        self.slack = MARGIN * (screen.errors + self.sums * screen.norms)
        self.common = MOST_LARGER * float(self.slack.median())
        self.larger = (self.slack > self.common).nonzero().squeeze(1)

    def places(self, span: slice, floor: Tensor) -> tuple[Tensor, int] | None:
        """Where a chunk [B, C], flat, may lie above its floor, [1] or [C], ascending; and C. None out of range."""
        block, at, d = self.block, features_of(self.block, span), self.block.x.shape[1]
        assert block.screen is not None
        W, b = block.W[at], block.b[at]
        norm = d**0.5 * max(abs(float(t)) for t in torch.aminmax(W))
        if not norm < LARGEST:
            return None
        floor = floor.expand(len(b)) if block.scale is None else floor / block.scale[at]
        least = floor - b - self.sums * (floor.abs() + b.abs()) - smallest_normal() * (d + 8)
        # a scale of 0 gives what is above no floor
        least = torch.where(least < torch.inf, least, torch.inf)
        z = scratch(W, block.n_tokens, len(b))
        torch.mm(block.screen.x, W.t(), out=z)
        places = places_reaching(z, in_bfloat16(least - norm * self.common))
        return (self._with_larger(places, z, least, norm) if len(self.larger) else places), z.shape[1]

    def _with_larger(self, places: Tensor, z: Tensor, least: Tensor, norm: float) -> Tensor:
        width = z.shape[1]
        own = in_bfloat16(least - norm * self.slack.index_select(0, self.larger)[:, None])
        row, column = (z.index_select(0, self.larger) >= own).nonzero(as_tuple=True)
        is_larger = torch.zeros(len(z), dtype=torch.bool).index_fill_(0, self.larger, True)
        others = places[is_larger.index_select(0, places // width).logical_not_()]
        return torch.cat((others, self.larger.index_select(0, row) * width + column)).sort().values


def in_bfloat16(least: Tensor) -> Tensor:
    """What a number that is at least this much is not below, when both are rounded to bfloat16."""
    return (least - UNIT * least.abs()).bfloat16()
