"""What a product of tokens and weights has to reach for an activation above the floor of its feature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder import Operands
from .screen import BEYOND, smallest_normal


def least_products(operands: Operands, floor: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """Of some features, [C] each: what x . w of an activation above the floor, [1] or [F], is at least, and of what
    size the numbers are that this is made of. Scales are not negative, nor are floors but without bias and scale.

    Neither is infinite: no product in range is as large as BEYOND.
    """
    b = operands.b[at]
    floor = (floor if len(floor) == 1 else floor[at]).expand(len(b))
    if operands.scale is not None:
        scale = operands.scale[at]
        # what the last rounding of an activation may have added; a scale of 0 gives what is above no floor
        floor = torch.where(scale > 0, (floor - smallest_normal()) / scale, torch.inf)
    floor = floor.clamp(-BEYOND, BEYOND)
    return floor - b, floor.abs() + b.abs()
