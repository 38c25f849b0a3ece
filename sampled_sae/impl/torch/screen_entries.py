"""Which activations may reach a floor, seen through one bfloat16 product.

With x^ and w^ the operands in bfloat16, z_ij = x_i . w_j + b_j reaches the floor f_j only where

    x^_i . w^_j + ||x^_i|| e_j + ||dx_i|| ||w_j|| + (b_j - f_j) >= 0,   e_j = ||dw_j|| + the rounding of sums,

as in screen.py. The left side is one product, in which what does not fit into bfloat16 is rounded up. So the bound is
that of each entry, a floor for each feature costs nothing, and the last rounding of the product cannot change its sign.
A floor for each token is compared with the product afterwards: rounding never swaps two numbers either. Both are
compared as whole numbers, for the bits of floats above zero sort as their values do, and those below are negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .products import features_of, padded_chunk
from .screen import FeatureRounding, scaled_bias


def seen_from_above(operands: Operands, span: slice, floor: Tensor | None = None) -> Tensor | None:
    """What some activations, less the floor of their feature, are at most; None where that is out of range.

    Returns bits of bfloat16, int16 [B, C], as `padded_chunk` has them. floor: [1] or [C]; none where it is not given.
    """
    screen, at = operands.screen, features_of(operands, span)
    assert screen is not None
    features, bias = FeatureRounding.of(operands, at), scaled_bias(operands, at)
    if not bool(((features.norms < LARGEST) & (bias.abs() < LARGEST)).all()):
        return None
    gap, sizes = (bias, bias.abs()) if floor is None else (bias - floor, bias.abs() + floor.abs())
    W = features.bounding(gap, sizes, 1)
    z, inner = padded_chunk(W, operands.n_tokens, span)
    torch.mm(screen.columns, W.t(), out=inner)
    return z.view(torch.int16)


def bits_of(floor: Tensor) -> Tensor:
    """int16, those of floors >= 0 rounded down to bfloat16."""
    return (floor.contiguous().view(torch.int32) >> 16).to(torch.int16)
