"""What the activations of a chunk are at most, seen through one bfloat16 product.

With x^ and w^ the operands in bfloat16, z_ij = x_i . w_j + b_j is at most

    x^_i . w^_j + ||x^_i|| e_j + ||dx_i|| ||w_j|| + b_j,   e_j = ||dw_j|| + the rounding of sums,

as in screen.py. That is one product, in which what does not fit into bfloat16 is rounded up. A floor for each token is
compared with it afterwards: rounding never swaps two numbers. Both are compared as whole numbers, for the bits of
floats above zero sort as their values do, and those below are negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder import Operands
from ..rounded_tokens import LARGEST
from .products import features_of, padded_chunk
from .screen import FeatureRounding, scaled_bias


def seen_features(operands: Operands, at: slice | Tensor) -> Tensor | None:
    """[C, width_of(d)] bfloat16: some features, whose product with the tokens no activation lies above.

    None where that is out of range.
    """
    # a search computes few of what it finds again, and measures nothing for it
    features, bias = FeatureRounding.of(operands, at), scaled_bias(operands, at)
    sizes = bias.abs()
    if not float(torch.maximum(features.norms, sizes).amax()) < LARGEST:  # or NaN
        return None
    return features.bounding(bias, sizes, 1)


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
