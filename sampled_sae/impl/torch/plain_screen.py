"""Which activations may lie above the floor of their feature, where bfloat16 holds weights and tokens as they are.

Then their bfloat16 product is off by the rounding of its sums alone, which a largest weight bounds well enough for a
whole chunk. The weights are read and never copied; only the product's own rounding widens the floors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .products import features_of
from .screen import MARGIN, UNIT, smallest_normal

# of the largest norm of a token: what rounding tokens to bfloat16 may have changed
MOST_CHANGED = 2.0**-20


def is_plain(operands: Operands) -> bool:
    """Whether weights and tokens are those of their bfloat16 product."""
    if operands.W.dtype != torch.bfloat16 or operands.screen is None:
        return False
    return bool(operands.screen.errors.amax() <= MOST_CHANGED * operands.screen.norms.amax())


def seen_plainly(operands: Operands, span: slice, floor: Tensor) -> tuple[Tensor, Tensor] | None:
    """A chunk z^ [B, C] in bfloat16, and what it is at least where the activation lies above its floor, [C].

    None where that is out of range. floor: [1] or [C].
    """
    screen, at, d = operands.screen, features_of(operands, span), operands.x.shape[1]
    assert screen is not None
    W, b = operands.W[at], operands.b[at]
    norm = d**0.5 * max(abs(float(t)) for t in torch.aminmax(W))
    if not norm < LARGEST:
        return None
    # sums of d terms, and those of one activation in float32, each in any order
    sums = 4 * (d + 8) * 2.0**-24
    of_tokens = float(screen.errors.amax()) + sums * float(screen.norms.amax())
    floor = floor.expand(len(b)) if operands.scale is None else floor / operands.scale[at]
    least = floor - b - sums * (floor.abs() + b.abs()) - (MARGIN * norm * of_tokens + smallest_normal() * (d + 8))
    least = least - UNIT * least.abs()
    # a scale of 0 gives what is above no floor
    least = torch.where(least < torch.inf, least, torch.inf).bfloat16()
    z = scratch(W, operands.n_tokens, span.stop - span.start)
    return torch.mm(screen.x, W.t(), out=z), least
