"""Both operands of the encoder's product in bfloat16, made on the device: docs/method.md, "Screening".

With x^ = x + dx and w^ = w + dw, and the product summed in float32 by tensor cores,

    |x^_i . w^_j - x_i . w_j| <= ||x^_i|| ||dw_j|| + ||dx_i|| ||w_j|| + SUMS d ||x^_i|| ||w^_j||
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import rounded_rows as kernel
from ...kernels.interpreter import INTERPRETED
from ...support.float32_products import tf32_allowed
from ..rounded_tokens import Looks, RoundedTokens, large_enough

SUMS = float(kernel.SUMS.value)
# no norm or error of a row of d numbers is said to be less than d times this
LEAST_NORM = float(kernel.LEAST.value)


class RoundedRows(NamedTuple):
    """values: bfloat16 [N, d]. norms: float32 [N], no less than those of the rows before the rounding. errors: float32
    [N], no less than the norms of what it changed. Each bound has a margin of a hundredth."""

    values: Tensor
    norms: Tensor
    errors: Tensor

    @property
    def rounded_norms(self) -> Tensor:
        """[N], no less than the norms of `values`."""
        return self.norms + self.errors

    def of(self, at: slice | Tensor) -> RoundedRows:
        """The same of some of the rows."""
        return RoundedRows(*(part[at] for part in self))


class RoundedOperands(RoundedTokens):
    """Tokens x [B, d] and weights W [F, d], float32, rounded; nothing here asks the device for a value.

    Attributes:
        tokens, weights: of x and of W. looks: as in RoundedTokens; what it counts is on the device.
    """

    def __init__(self, x: Tensor, tokens: RoundedRows, weights: RoundedRows, looks: Looks | None = None) -> None:
        super().__init__(x, looks)
        self.tokens, self.weights = tokens, weights

    def of_tokens(self, at: slice | Tensor) -> RoundedOperands:
        """The same of some of the tokens."""
        return RoundedOperands(self._tokens[at], self.tokens.of(at), self.weights, self.looks)

    def of_features(self, features: Tensor) -> RoundedOperands:
        """The same of some of the features, int64 [P]."""
        return RoundedOperands(self._tokens, self.tokens, self.weights.of(features), self.looks)


def rounded_operands(x: Tensor, W: Tensor, screen: str) -> RoundedOperands | None:
    """x [B, d] and W [F, d] in bfloat16 where `screen` asks for it and products are IEEE float32; else None."""
    if screen == "off" or x.dtype != torch.float32 or W.dtype != torch.float32 or not ieee_products():
        return None
    if x.shape[0] == 0 or not (screen == "bf16" or (large_enough(len(x), len(W)) and fast_bfloat16(x))):
        return None
    return RoundedOperands(x, RoundedRows(*round_rows(x)), RoundedRows(*round_rows(W)))


def fast_bfloat16(x: Tensor) -> bool:
    """Whether the device of x multiplies bfloat16 faster than float32."""
    return x.is_cuda and not INTERPRETED.value


def tensors_of(screen: RoundedTokens | None) -> list[Tensor]:
    """As an operator takes them; none without a screen."""
    return [*screen.tokens, *screen.weights] if isinstance(screen, RoundedOperands) else []


def of_tensors(x: Tensor, tensors: Sequence[Tensor]) -> RoundedOperands | None:
    """The inverse of `tensors_of`, for the tokens x."""
    return RoundedOperands(x, RoundedRows(*tensors[:3]), RoundedRows(*tensors[3:])) if tensors else None


@torch.compiler.assume_constant_result
def ieee_products() -> bool:
    """Whether float32 products are as exact as those that a screen ends in; a compiled step asks once."""
    return not tf32_allowed()


@torch.library.custom_op("sampled_sae::round_rows", mutates_args=())
def round_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, norms, errors) of rows float32 [N, d]: see RoundedRows; no gradient."""
    return kernel.rounded_rows(rows)


@round_rows.register_fake
def _(rows: Tensor) -> Any:
    norms = rows.new_empty(rows.shape[0])
    return rows.new_empty(rows.shape, dtype=torch.bfloat16), norms, torch.empty_like(norms)
