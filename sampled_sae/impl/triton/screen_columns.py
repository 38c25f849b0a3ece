"""Between what and what the score of each column lies, seen through bfloat16 products, and which are the largest.

The device decides which columns stay open, computes those in full, or all of them where there are too many, and tells
the host nothing. Scores are bounded as sums over the tokens: squares of norms, or 1 for a column that fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import column_bounds as bounds_kernel
from ...kernels.firing_bounds import firing_bounds
from ...kernels.rounded_rows import rounded_rows
from ...kernels.spectral_bound import spectral_bound, trace_bound
from ...kernels.undecided_columns import settled_statistics, statistics_of
from ..column_bounds import MOST_PARTS, SeenColumns, bounds_of_flags, flags_of
from ..encoder import Operands
from ..ranking import keys_of
from ..rounded_tokens import Looks
from ..torch.scores import finish_scores
from .pool import largest_keys, top_pool
from .products import product
from .scores import column_statistics
from .screen import RoundedOperands, RoundedRows, tensors_of

# what squares and roots of a few float32 numbers are rounded by, and more
OF_ROOTS = 1 + 2.0**-20


class BoundsOnDevice(NamedTuple):
    """low, high: float32 [F], of each column's sum over the tokens. operands: in full. looks: where it is counted how
    many columns are computed again."""

    low: Tensor
    high: Tensor
    operands: Operands
    score: str
    looks: Looks

    def largest(self, size: int, noise: Tensor | None = None) -> tuple[Tensor, None]:
        """The `size` columns of highest score, below F, or of highest ln(score) + noise [F]: int64 ascending."""
        if noise is None:
            return top_pool(self.settled(self.low, self.high, size), size), None
        scores = self.settled(*drawn(self.low, self.high, noise, self.score), size)
        return largest_keys(keys_of(scores, noise), size), None

    def settled(self, low: Tensor, high: Tensor, size: int) -> Tensor:
        """[F]: scores whose `size` largest are those of the columns, ranked by what `low` and `high` bound."""
        x, W, b, scale, *_ = self.operands
        statistics, opened = settle_columns(x, W, b, scale, self.score, self.low, low, high, size)
        self.looks.see_columns(self.operands.n_features, opened)
        return finish_scores(statistics, self.score)


def drawn(low: Tensor, high: Tensor, noise: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Bounds in the order of ln(score) + noise, as numbers >= 0; what rounding them changes is left open too."""
    weights = (noise * (2 if score == "l2" else 1)).exp().float()
    return low * weights * (1 - 1e-6), high * weights * (1 + 1e-6)


def column_bounds(operands: Operands, score: str) -> BoundsOnDevice | None:
    """Of every feature; None without a screen and for entropy."""
    screen = operands.screen
    if not isinstance(screen, RoundedOperands) or score == "entropy":
        return None
    low, high = bounds_at_once(tensors_of(screen), operands.x, operands.b, operands.scale, score)
    return BoundsOnDevice(low, high, operands.in_full(), score, screen.looks)


def seen_columns(operands: Operands, score: str) -> SeenColumns | None:
    """Each column over the tokens, of which these may be a part; None without a screen and for entropy.

    Behind the sums of squares stand four numbers of the tokens, the squares of what `stretches` gives: those of parts
    add up to no less than that of all.
    """
    screen = operands.screen
    if not isinstance(screen, RoundedOperands) or score == "entropy":
        return None
    tokens, weights, b, scale = screen.tokens, screen.weights, operands.b, operands.scale
    x, W = tokens.values, weights.values
    n_features, d = W.shape
    if score == "uniform":
        does, may = firing_bounds(*tokens, *weights, b) > 0
        return SeenColumns(flags_of(does, may), bounds_of_flags)
    sums = operands.x.new_zeros(n_features + 4)
    if len(x):
        sums[:n_features] = column_statistics(x, W, b, score, scale)[0]
        of_tokens = torch.cat(stretches(tokens, operands.x - x))
        sums[n_features:] = (of_tokens * OF_ROOTS).square()

    def bounds(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        of_x, of_changes = (most[n_features:].sqrt() * OF_ROOTS).split(2)
        # each part is added with one more rounding, which counts as 1,024 tokens there
        n_tokens = operands.whole_shape[0] + 1024 * MOST_PARTS
        others = weights.norms, weights.errors, b, scale, of_x, of_changes, n_tokens, d
        low, high = bounds_kernel.column_bounds(most[:n_features], *others)
        return (low if least is most else bounds_kernel.column_bounds(least[:n_features], *others)[0]), high

    return SeenColumns(sums, bounds)


def stretches(tokens: RoundedRows, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Of x^, the rounded tokens, and of `changes`, float32 [B, d], what rounding changed: float32 [2] each.

    The first number is no less than the largest singular value, the second no less than the Frobenius norm.
    """
    again = RoundedRows(*rounded_rows(changes))
    return stretch(tokens), stretch(again, again.errors)


def stretch(rows: RoundedRows, left: Tensor | None = None) -> Tensor:
    """Of `rows.values`, bfloat16 [B, d]; of the first number, with what is added to them, rows of norms `left` [B]."""
    X = rows.values
    trace = trace_bound(rows.norms, rows.errors)
    n_tokens, d = X.shape
    G = product(X.t(), X) if n_tokens > d else product(X, X.t())
    V, norms_1, errors_1 = rounded_rows(G, trace[1:])
    V, norms_2, errors_2 = rounded_rows(product(V, V.t()))
    _, norms_3, _ = rounded_rows(product(V, V.t()))
    n = max(n_tokens, d)
    return spectral_bound(trace, norms_1, errors_1, norms_2, errors_2, norms_3, n, left)


@torch.library.custom_op("sampled_sae::seen_columns", mutates_args=())
def bounds_at_once(
    screen: Sequence[Tensor], full_x: Tensor, b: Tensor, scale: Tensor | None, score: str
) -> tuple[Tensor, Tensor]:
    """(least, greatest) sum over the tokens of each column, float32 [F]; the second is not finite where all is open.

    screen: `tensors_of` one. full_x: x before it was rounded.
    """
    x, x_norms, x_errors, W, W_norms, W_errors = screen
    if score == "uniform":
        sure, possible = firing_bounds(x, x_norms, x_errors, W, W_norms, W_errors, b).clamp_(max=1)
        return sure, possible.clone()
    sums = column_statistics(x, W, b, score, scale)[0]
    of_x, of_changes = stretches(RoundedRows(x, x_norms, x_errors), full_x - x)
    return bounds_kernel.column_bounds(sums, W_norms, W_errors, b, scale, of_x, of_changes, *x.shape)


@bounds_at_once.register_fake
def _(screen: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(screen[-1]), torch.empty_like(screen[-1])


@torch.library.custom_op("sampled_sae::settle_columns", mutates_args=())
def settle_columns(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    scale: Tensor | None,
    score: str,
    known: Tensor,
    low: Tensor,
    high: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """(statistics [1, F] whose `size` largest are right, how many columns were computed, int64 [1]): see
    `kernels/undecided_columns.py`."""
    statistics, opened = settled_statistics(x, W, b, scale, score, known, low, high, size)
    return statistics[None], opened


@settle_columns.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    known = rest[-4]
    return torch.empty_like(known)[None], x.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("sampled_sae::open_columns", mutates_args=())
def open_columns(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, score: str, is_open: Tensor
) -> tuple[Tensor, Tensor]:
    """(statistics [1, F] of the columns `is_open`, bool [F], how many columns were computed, int64 [1]): see
    `kernels/undecided_columns.py`."""
    statistics, opened = statistics_of(x, W, b, scale, score, is_open)
    return statistics[None], opened


@open_columns.register_fake
def _(x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, score: str, is_open: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(1, W.shape[0]), x.new_empty(1, dtype=torch.int64)
