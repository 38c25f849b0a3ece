"""Which activations may lie above the floor of their feature, seen through a bfloat16 product with a few more columns.

With x^ and w^ the operands in bfloat16, z_ij = x_i . w_j + b_j lies above the floor f_j only where

    x^_i . w^_j + ||x^_i|| e_j + ||dx_i|| ||w_j|| + (b_j - f_j) >= 0,   e_j = ||dw_j|| + the rounding of sums,

as in screen.py. The left side is one product: of [x^, ||x^||, ||dx||, 1, 1] and [w^, e, ||w||, h, l], where h + l is
b_j - f_j in two pieces of bfloat16, and what does not fit any of them is rounded up. So the bound is that of each
entry, a threshold for each feature costs nothing, and the last rounding of the product cannot change its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import LARGEST, RoundedTokens, row_norms
from .products import features_of, raised
from .screen import MARGIN, smallest_normal

COLUMNS = 4
# a number <= 0 of this size is below every sum of products in range, and finite in bfloat16
NEVER = -1e38


def seen_tokens(screen: RoundedTokens) -> Tensor:
    """[B, d + 4] bfloat16: the tokens and what the bound asks of them."""
    n_tokens, d = screen.x.shape
    seen = screen.x.new_ones(n_tokens, d + COLUMNS)
    seen[:, :d] = screen.x
    seen[:, d], seen[:, d + 1] = rounded_up(screen.norms), rounded_up(screen.errors)
    return seen


def seen_features(operands: Operands, at: slice | Tensor, floor: Tensor) -> Tensor | None:
    """[C, d + 4] bfloat16: some features and what the bound asks of them; None where that is out of range.

    floor: [1] or [C].
    """
    W, b, scale = operands.W[at], operands.b[at], operands.scale
    n_features, d = W.shape
    low = scratch(W.new_empty(0, dtype=torch.bfloat16), n_features, d + COLUMNS)
    low[:, :d].copy_(W)
    exact = raised(W, operands.x)
    change = scratch(exact, n_features, d).copy_(low[:, :d])
    norms, errors = row_norms(exact), row_norms(torch.sub(exact, change, out=change))
    if not bool((norms < LARGEST).all()):
        return None
    floor = floor.expand(n_features) if scale is None else floor / scale[at]
    gap, size = b - floor, b.abs() + floor.abs()
    # sums of d + 4 terms, and those of one activation in float32, each in any order
    sums = 4 * (d + 8) * 2.0**-24
    low[:, d] = rounded_up(MARGIN * (errors + sums * (norms + errors)))
    low[:, d + 1] = rounded_up(MARGIN * norms)
    # what two pieces leave of the gap is below 2^-15 of it
    gap = gap + (sums + 2.0**-15) * size + smallest_normal() * (d + 8)
    gap = torch.where(gap > NEVER, gap, NEVER)
    torch.sub(gap, low[:, d + 2].copy_(gap), out=gap)
    low[:, d + 3] = gap
    return low


def rounded_up(values: Tensor) -> Tensor:
    """values >= 0 in bfloat16, none of them smaller."""
    return (values * (1 + 2.0**-7)).bfloat16()


def seen_above(operands: Operands, tokens: Tensor, span: slice, floor: Tensor) -> Tensor | None:
    """A chunk [B, C] in bfloat16: where it is >= 0 the activation may lie above its floor, [1] or [C]."""
    low = seen_features(operands, features_of(operands, span), floor)
    if low is None:
        return None
    return torch.mm(tokens, low.t(), out=scratch(low, operands.n_tokens, span.stop - span.start))
