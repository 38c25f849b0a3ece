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

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .products import features_of, padded_chunk, parts_of
from .screen import FeatureRounding, scaled_bias

# elements of rounded weights that are multiplied at once, which stay in the cache
WEIGHT_ELEMENTS = 1 << 21


def seen_features(operands: Operands, at: slice | Tensor, floor: Tensor | None = None) -> Tensor | None:
    """[C, width_of(d)] bfloat16: some features, whose product with the tokens no activation lies above.

    floor: [1] or [C], what is taken from each activation. None where that is out of range.
    """
    # a search computes few of what it finds again, and measures nothing for it
    features, bias = FeatureRounding.of(operands, at, measured=floor is not None), scaled_bias(operands, at)
    if not bool(((features.norms < LARGEST) & (bias.abs() < LARGEST)).all()):
        return None
    if floor is None:
        return features.bounding(bias, bias.abs(), 1)
    return features.bounding(bias - floor, bias.abs() + floor.abs(), 1)


def seen_above(operands: Operands, span: slice, floor: Tensor) -> Tensor | None:
    """A chunk [B, C] in bfloat16: where it is >= 0 the activation may lie above its floor, [1] or [C]."""
    assert operands.screen is not None
    tokens = operands.screen.columns
    z = scratch(tokens, operands.n_tokens, span.stop - span.start)
    for at, columns in parts_of(span, operands.W.shape[1], WEIGHT_ELEMENTS):
        W = seen_features(operands, features_of(operands, at), floor if len(floor) == 1 else floor[columns])
        if W is None:
            return None
        torch.mm(tokens, W.t(), out=z[:, columns])
    return z


def seen_bits(operands: Operands, span: slice) -> Tensor | None:
    """What some activations are at most: bits of bfloat16, int16 [B, C], as `padded_chunk` has them."""
    assert operands.screen is not None
    W = seen_features(operands, features_of(operands, span))
    if W is None:
        return None
    z, inner = padded_chunk(W, operands.n_tokens, span)
    torch.mm(operands.screen.columns, W.t(), out=inner)
    return z.view(torch.int16)


def bits_of(floor: Tensor) -> Tensor:
    """int16, those of floors >= 0 rounded down to bfloat16."""
    return (floor.contiguous().view(torch.int32) >> 16).to(torch.int16)
