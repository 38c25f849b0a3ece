"""Activations seen through bfloat16 products, with a bound on what that changes: docs/method.md, "Screening".

x^ = x + dx and w^ = w + dw are the operands rounded to bfloat16. z^_ij = x^_i . w^_j is summed in float32 and rounded
to bfloat16 in turn. Before that last rounding

    |z^_ij - z_ij| <= ||x^_i|| ||dw_j|| + ||dx_i|| ||w_j|| + 2 d 2^-24 ||x^_i|| ||w^_j||

whose last term is the rounding of the sums, taken twice for safety. The scale of an activation is part of w and of the
bias for scores; a threshold is divided by it (`unscaled`). A few further columns of both operands carry the bias and
the bound, so that one product gives all of it:
[x^, ||x^||, ||dx||, 1, 1] times [w^, e, g, h, l], where h + l is a number for each feature in two pieces.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...support.argument_checks import HALF
from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import (
    COLUMNS,
    LOST,
    Prepare,
    RoundedTokens,
    large_enough,
    rounded_up,
    row_norms,
    width_of,
)
from .products import raised

# what rounding to bfloat16 moves a number by, at most, with the roundings of float32 that come on top
UNIT = 1.01 * 2.0**-8
# norms and bounds are themselves computed in float32
MARGIN = 1.01
# a number of this size is beyond every sum of products in range, and finite in bfloat16
BEYOND = 1e38
# more than what adding a bias, a scale and dividing by it round, of the numbers that are added
ROUNDED = 2.0**-20
# elements of weights that are rounded at once
PIECE_ELEMENTS = 1 << 17
# "auto" of a search above thresholds, which rounds no weights that are in bfloat16 (plain_screen.py)
FOR_THRESHOLDS = "auto for thresholds"


def rounded(
    x: Tensor, W: Tensor, screen: str, dtype: torch.dtype = torch.float32, prepare: Prepare | None = None
) -> RoundedTokens | None:
    """x [B, d], `prepare`d to `dtype`, in bfloat16 where `screen` asks for it and the operands allow it; else None."""
    if screen == "off" or W.dtype not in (torch.float32, *HALF) or x.device.type != "cpu" or dtype != torch.float32:
        return None
    unrounded = W.shape[1] if screen == FOR_THRESHOLDS and W.dtype == torch.bfloat16 else 0
    if screen != "bf16" and not (large_enough(len(x), len(W), unrounded) and fast_bfloat16()):
        return None
    return RoundedTokens(x, prepare=prepare) if sums_in_float32() else None


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
    """Some features in bfloat16, with their scale: W [C, width_of(d)], the last COLUMNS of them not yet set.

    norms, errors: float32 [C], of the rows before the rounding, and at least those of what it changed.
    """

    W: Tensor
    norms: Tensor
    errors: Tensor

    @classmethod
    def of(cls, operands: Operands, at: slice | Tensor, measured: bool = False) -> FeatureRounding:
        """In memory that serves again. Errors are what rounding may do to such a row, unless they are `measured`."""
        rows, like = operands.W[at], operands.b
        scale = None if operands.scale is None else operands.scale[at]
        n_features, d = rows.shape
        low = scratch(rows.new_empty(0, dtype=torch.bfloat16), n_features, width_of(d))
        low[:, d:-COLUMNS] = 0
        norms, errors = like.new_empty(2, n_features)
        # some rows after others, which are in the cache for all that is done to them
        step = max(1, PIECE_ELEMENTS // d)
        room = scratch(like, min(step, n_features), d) if measured else None
        pieces = zip(rows.split(step), low[:, :d].split(step), norms.split(step), errors.split(step))
        for i, (exact, inner, norm, error) in enumerate(pieces):
            exact = raised(exact, like)
            if scale is not None:
                factor = scale[i * step : i * step + len(exact), None]
                exact = torch.mul(exact, factor, out=scratch(like, *exact.shape))
            inner.copy_(exact)
            torch.linalg.vector_norm(exact, dim=1, out=norm)
            if room is not None:
                change = room[: len(exact)].copy_(inner)
                torch.linalg.vector_norm(torch.sub(exact, change, out=change), dim=1, out=error)
        norms += LOST * d**0.5
        if measured:
            errors += LOST * d**0.5
        else:
            unit = 0.0 if scale is None and rows.dtype == torch.bfloat16 else UNIT
            errors = unit * norms + smallest_normal() * d**0.5
        return cls(low, norms, errors)

    def sum_errors(self, d: int) -> Tensor:
        """[C]: what rounding the sums over d moves z^_ij by, at most, for ||x^_i|| = 1."""
        return 2 * d * 2.0**-24 * (self.norms + self.errors) + smallest_normal() * d

    @property
    def entry_errors(self) -> Tensor:
        """[C]: what an activation moves by, at most, for ||x^_i|| = 1 and dx_i = 0."""
        return MARGIN * (self.errors + sums_of(self.W.shape[1]) * (self.norms + self.errors))

    def plus(self, offset: Tensor, of_norms: Tensor | float = 0, of_errors: Tensor | float = 0) -> Tensor:
        """W, whose product with the tokens is then z^ + offset [C] + ||x^|| of_norms + ||dx|| of_errors."""
        d = self.W.shape[1] - COLUMNS
        self.W[:, d] = of_norms
        self.W[:, d + 1] = of_errors
        self.W[:, d + 2 :] = in_two_pieces(offset)
        return self.W

    def bounding(self, offset: Tensor, sizes: Tensor, side: int) -> Tensor:
        """The same, of which the product is at least z + offset for side 1, at most that for side -1."""
        of_norms, of_errors = rounded_up(self.entry_errors), rounded_up(MARGIN * self.norms)
        if side < 0:
            of_norms, of_errors = -of_norms, -of_errors
        return self.plus(torch.add(offset, offset_errors(sizes, self.W.shape[1]), alpha=side), of_norms, of_errors)


def sums_of(width: int) -> float:
    """What rounding moves sums of that many terms by, and those of one activation in float32, each in any order."""
    return 4 * (width + 4) * 2.0**-24


def offset_errors(sizes: Tensor, width: int) -> Tensor:
    """What an activation moves by, at most, for what is added to it, of these sizes, in two pieces."""
    return (sums_of(width) + 2.0**-15) * sizes + smallest_normal() * (width + 4)


def in_two_pieces(offset: Tensor) -> Tensor:
    """bfloat16 [C, 2] whose sums are offset [C], but for less than 2^-15 of it."""
    left = offset.clamp(-BEYOND, BEYOND)
    high = left.bfloat16()
    return torch.stack((high, (left - high).bfloat16()), 1)


def smallest_normal() -> float:
    """bfloat16 instructions take smaller numbers as zero."""
    return float(torch.finfo(torch.bfloat16).tiny)


def norms_into(out: Tensor, rows: Tensor) -> None:
    """Norms of rows of weights, float32 [C]; times MARGIN none is too small."""
    if rows.dtype == torch.float16:  # norms may be too small for it
        step = max(1, PIECE_ELEMENTS // rows.shape[1])
        for some, norms in zip(rows.split(step), out.split(step)):
            torch.linalg.vector_norm(some, dim=1, dtype=out.dtype, out=norms)
    else:
        out.copy_(torch.linalg.vector_norm(rows, dim=1))
    out += LOST * rows.shape[1] ** 0.5


def scaled_bias(operands: Operands, at: slice | Tensor) -> Tensor:
    """[C], of some features."""
    return operands.b[at] if operands.scale is None else operands.b[at] * operands.scale[at]


def rounding_slack(operands: Operands, at: slice | Tensor) -> Tensor:
    """[B]: how far two float32 values of one activation of these features lie apart, in whatever order they sum."""
    seen = operands.screen
    assert seen is not None
    norms, bias = row_norms(raised(operands.W[at], operands.x)), operands.b[at].abs()
    if operands.scale is not None:
        scale = operands.scale[at]
        norms, bias = norms * scale, bias * scale
    sizes = (seen.norms + seen.errors) * norms.amax() + bias.amax()
    return MARGIN * sums_of(operands.x.shape[1]) * sizes + smallest_normal()


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
