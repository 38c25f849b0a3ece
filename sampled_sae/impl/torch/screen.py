"""Activations seen through bfloat16 products, with a bound on what that changes: docs/method.md, "Screening".

x^ = x + dx and w^ = w + dw are the operands rounded to bfloat16. z^_ij = x^_i . w^_j is summed in float32 and rounded
to bfloat16 in turn. Before that last rounding

    |z^_ij - z_ij| <= ||x^_i|| ||dw_j|| + ||dx_i|| ||w_j|| + 2 d 2^-24 ||x^_i|| ||w^_j||

whose last term is the rounding of the sums, taken twice for safety. The last rounding moves z by at most 2^-8 |z|.
Adding the bias and multiplying by a positive scale move the bound along; the ReLU does not widen it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...support.argument_checks import HALF
from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import RoundedTokens, row_norms
from .products import features_of, padded_chunk, raised

# what rounding to bfloat16 moves a number by, at most, with the roundings of float32 that come on top
UNIT = 1.01 * 2.0**-8
# norms and bounds are themselves computed in float32
MARGIN = 1.01
# activations in a batch below which a product costs too little to be screened
FEWEST_ACTIVATIONS = 1 << 20
# tokens below which weights cost more to round than the product does (benchmarks/results/inference.md)
FEWEST_TOKENS = 256
# "auto" of a search above thresholds, which rounds no weights that are in bfloat16 (plain_screen.py)
FOR_THRESHOLDS = "auto for thresholds"


def rounded(x: Tensor, W: Tensor, screen: str) -> RoundedTokens | None:
    """x [B, d] in bfloat16 where `screen` asks for it and the operands allow it; else None."""
    if screen == "off" or x.dtype != torch.float32 or W.dtype not in (torch.float32, *HALF) or x.device.type != "cpu":
        return None
    unrounded = screen == FOR_THRESHOLDS and W.dtype == torch.bfloat16
    if screen != "bf16" and not (large_enough(len(x), len(W), unrounded) and fast_bfloat16()):
        return None
    return RoundedTokens(x) if sums_in_float32() else None


def large_enough(n_tokens: int, n_features: int, unrounded: bool = False) -> bool:
    """Whether a product of this size is worth a screen; `unrounded`: its weights need no rounding."""
    return (unrounded or n_tokens >= FEWEST_TOKENS) and n_tokens * n_features >= FEWEST_ACTIVATIONS


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


@functools.cache
def sums_in_float32() -> bool:
    """Whether bfloat16 products are summed in float32, as the bound says: 4,096 ones are 256 where they are not."""
    ones = torch.ones(64, 4096, dtype=torch.bfloat16, device="cpu")
    return bool((ones @ ones.t() == 4096).all())


class FeatureRounding(NamedTuple):
    """Some features in bfloat16: W [C, d]; float32 [C] norms of the rows before it, and of what it changed."""

    W: Tensor
    norms: Tensor
    errors: Tensor

    @classmethod
    def of(cls, W: Tensor) -> FeatureRounding:
        """Of W [C, d] float32, bfloat16 or float16, in memory that serves again."""
        exact = raised(W, W.new_empty(0, dtype=torch.float32))
        low = scratch(W.new_empty(0, dtype=torch.bfloat16), *W.shape).copy_(W)
        change = torch.sub(exact, low, out=scratch(exact, *W.shape))
        return cls(low, row_norms(exact), row_norms(change))

    def sum_errors(self, d: int) -> Tensor:
        """[C]: what rounding the sums over d moves z^_ij by, at most, for ||x^_i|| = 1."""
        return 2 * d * 2.0**-24 * (self.norms + self.errors) + smallest_normal() * d


def smallest_normal() -> float:
    """bfloat16 instructions take smaller numbers as zero."""
    return float(torch.finfo(torch.bfloat16).tiny)


def entry_slack(operands: Operands, at: slice | Tensor, features: FeatureRounding) -> Tensor:
    """[B]: an activation of these features that is at least t > 0 is seen as at least (1 - UNIT) t - slack."""
    seen = operands.screen
    assert seen is not None
    norms, errors, sums = features.norms, features.errors, features.sum_errors(operands.x.shape[1])
    bias = operands.b[at].abs()
    if operands.scale is not None:
        scale = operands.scale[at]
        norms, errors, sums, bias = (t * scale for t in (norms, errors, sums, bias))
    by_entry = seen.norms * (errors.amax() + sums.amax()) + seen.errors * norms.amax()
    return MARGIN * (1 + UNIT) * (by_entry + smallest_normal() * (1 + norms.amax())) + UNIT * bias.amax()


def rounding_slack(operands: Operands, at: slice | Tensor) -> Tensor:
    """[B]: how far two float32 values of one activation of these features lie apart, in whatever order they sum."""
    seen = operands.screen
    assert seen is not None
    norms, bias = row_norms(raised(operands.W[at], operands.x)), operands.b[at].abs()
    if operands.scale is not None:
        scale = operands.scale[at]
        norms, bias = norms * scale, bias * scale
    sizes = (seen.norms + seen.errors) * norms.amax() + bias.amax()
    return MARGIN * 4 * (operands.x.shape[1] + 4) * 2.0**-24 * sizes + smallest_normal()


def screened_at(operands: Operands, span: slice) -> tuple[Tensor, Tensor]:
    """Activations as a bfloat16 product has them, like `activations_at`, and the `entry_slack` of its tokens."""
    screen = operands.screen
    assert screen is not None
    at = features_of(operands, span)
    a, inner = padded_chunk(operands, span)
    features = FeatureRounding.of(operands.W[at])
    z = scratch(screen.x, operands.n_tokens, span.stop - span.start)
    torch.mm(screen.x, features.W.t(), out=z)
    inner.copy_(z).add_(operands.b[at])
    if operands.scale is not None:
        inner.mul_(operands.scale[at])
    return a, entry_slack(operands, at, features)
