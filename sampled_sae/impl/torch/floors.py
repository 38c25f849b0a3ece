"""What a product of tokens and weights has to reach for an activation above the floor of its feature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder import Operands
from .screen import BEYOND, smallest_normal

# more than what adding a bias, a scale and dividing by it round, of the numbers that are added
ROUNDED = 2.0**-20


def least_products(operands: Operands, floor: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """Of some features, [C] each: what x . w of an activation above the floor, [1] or [F], is at least, and of what
    size the numbers are that this is made of. Scales are not negative, nor are floors but without bias and scale.

    Neither is infinite: no product in range is as large as BEYOND.
    """
    b, floor = operands.b[at], unscaled(operands, floor, at).clamp_(-BEYOND, BEYOND)
    return floor - b, floor.abs() + b.abs()


def least_in_full(operands: Operands, floor: Tensor, at: slice) -> Tensor:
    """[C]: what no product in full precision lies below whose activation, computed of it, is above the floor.

    Products may leave the range here; what is infinite stays so.
    """
    b, floor = operands.b[at], unscaled(operands, floor, at)
    slack = ROUNDED * floor.abs() + ROUNDED * b.abs() + smallest_normal()
    return (floor - b).sub_(torch.where(slack.isfinite(), slack, 0))


def unscaled(operands: Operands, floor: Tensor, at: slice) -> Tensor:
    """[C]: the floors of x . w + b, before the scale."""
    floor = floor if len(floor) == 1 else floor[at]
    if operands.scale is None:
        return floor.repeat(at.stop - at.start) if len(floor) == 1 else floor.clone()
    scale = operands.scale[at]
    # what the last rounding of an activation may have added; a scale of 0 gives what is above no floor
    return torch.where(scale > 0, (floor - smallest_normal()) / scale, torch.inf)
