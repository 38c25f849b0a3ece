"""Between what and what the score of each column lies, seen through bfloat16 products.

The norm of a column moves by no more than the norm of its error. With E = z^ - z as in screen.py,
||E_:j|| <= ||x^||_2 ||dw_j|| + ||dx||_2 ||w_j|| + the rounding of the sums and of z^, with spectral norms of [B, d]
matrices. These come from Gram matrices: a Cholesky factor of t I - G proves that no eigenvalue of G is above t.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...support.reused_memory import scratch
from ..column_bounds import UNKNOWN, ColumnBounds, SeenColumns, bounds_of_flags, flags_of
from ..encoder import Operands
from .products import chunk_width, token_blocks, without_autocast
from .scores import column_scores
from .screen import MARGIN, PIECE_ELEMENTS, UNIT, FeatureRounding, offset_errors, scaled_bias, smallest_normal

POWER_STEPS = 8
TRIES = 3
RAISED_ROWS = 64
# the square of anything smaller may be lost
LEAST_NORM = 2.0**-62


@without_autocast
def column_bounds(operands: Operands, score: str) -> ColumnBounds | None:
    """Of every feature; None for entropy, and where a bound would not be finite."""
    seen, screen = seen_columns(operands, score), operands.screen
    if seen is None or screen is None:
        return None
    low, high = seen.bounds(seen.numbers, seen.numbers)
    if not bool(high.isfinite().all()):
        return None
    full = operands.in_full()
    return ColumnBounds(low, high, lambda at: column_scores(full.of_features(at), score), screen.looks)


@without_autocast
def seen_columns(operands: Operands, score: str) -> SeenColumns | None:
    """What bounds every feature's score; None without a screen and for entropy."""
    if operands.screen is None or score == "entropy":
        return None
    if score == "uniform":
        return fires(operands)
    seen = norms(operands)
    if score == "l2":
        return seen

    def squared(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        low, high = seen.bounds(least, most)
        return low.square(), high.square()

    return SeenColumns(seen.numbers, squared)


def norms(operands: Operands) -> SeenColumns:
    """L2 norms of the columns' activations.

    The sums are the squares of the norms that are seen, and four numbers of the tokens: squares of the spectral norms
    of x^ and dx and of the norm of x^, of which those of parts of the tokens add up to no less, and how many they are.
    """
    x, screen, n_features = operands.x, operands.screen, operands.n_features
    assert screen is not None
    d = x.shape[1]
    sums, of_weights = x.new_zeros(n_features + 4), FeatureRounding(operands.W, *x.new_zeros(2, n_features))
    offsets = x.new_zeros(n_features)
    if screen.in_range:
        squares = sums[:n_features]
        for block, at, features in rounded_features(operands):
            bias = scaled_bias(operands, at)
            squares[at] += squared_norms(product(block, features.plus(bias)), x)
            of_weights.norms[at], of_weights.errors[at] = features.norms, features.errors
            offsets[at] = offset_errors(bias.abs(), features.W.shape[1])
        # and what rounding the changes in turn may leave of them
        changes = spectral_bound(changes_of(x, screen.x)) + UNIT * float(torch.linalg.vector_norm(screen.errors))
        sizes = (spectral_bound(screen.x), changes, float(torch.linalg.vector_norm(screen.norms)))
        sums[n_features:] = x.new_tensor([*((size + LEAST_NORM) ** 2 for size in sizes), len(x)])
    else:
        sums.fill_(torch.nan)

    def bounds(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        tokens, changes, every, root = most[n_features:].sqrt().tolist()
        of_sums = of_weights.sum_errors(d)
        errors = MARGIN * (tokens * of_weights.errors + changes * of_weights.norms + every * of_sums)
        low, high = least[:n_features].sqrt(), most[:n_features].sqrt()
        # the rounding of z^, and that of the norm itself
        errors += root * offsets + (UNIT + root**2 * 2.0**-24) * high
        return (low - errors).clamp_min_(0), high + errors

    return SeenColumns(sums, bounds)


def fires(operands: Operands) -> SeenColumns:
    """Uniform scores: 1 where an activation is above zero, else 0."""
    assert operands.screen is not None
    flags = torch.zeros(operands.n_features, dtype=torch.uint8, device=operands.x.device)
    if operands.screen.in_range:
        for block, at, features in rounded_features(operands):
            bias = scaled_bias(operands, at)
            may = (product(block, features.bounding(bias, bias.abs(), 1)).view(torch.int16) >= 0).any(0)
            does = (product(block, features.bounding(bias, bias.abs(), -1)).view(torch.int16) > 0).any(0)
            flags[at] = torch.maximum(flags[at], flags_of(does, may))
    else:
        flags.fill_(UNKNOWN)
    return SeenColumns(flags, bounds_of_flags)


def rounded_features(operands: Operands) -> Iterator[tuple[Operands, slice, FeatureRounding]]:
    """(block of tokens, some features, their rounding) for all features of one block after another."""
    # of no tokens too: what is known of the weights has to be the same on all processes
    for _, block in token_blocks(operands) if operands.n_tokens else [(slice(0), operands)]:
        step = chunk_width(block)
        for start in range(0, operands.n_features, step):
            at = slice(start, min(start + step, operands.n_features))
            yield block, at, FeatureRounding.of(block, at, measured=True)


def product(operands: Operands, W: Tensor) -> Tensor:
    """bfloat16 [B, C], of rows [C, width_of(d)] that have further columns.

    This way around: what a product rearranges in memory first are its right rows, here those of the weights, once each.
    """
    assert operands.screen is not None
    return torch.mm(operands.screen.columns, W.t(), out=scratch(W, operands.n_tokens, len(W)))


def squared_norms(z: Tensor, like: Tensor) -> Tensor:
    """[C], of the columns of relu(z), z [B, C]: a few rows at a time, raised to the dtype of `like`, in the cache."""
    n_rows = min(RAISED_ROWS, len(z))
    sums, room = scratch(like, 2, n_rows, z.shape[1])
    sums.zero_()
    for rows in z.split(RAISED_ROWS):
        raised = room[: len(rows)].copy_(rows).clamp_min_(0)
        sums[: len(rows)].addcmul_(raised, raised)
    return sums.sum(0)


def changes_of(x: Tensor, rounded: Tensor) -> Tensor:
    """bfloat16 [B, d], x - rounded in turn rounded: some rows after others, which stay in the cache."""
    changes = torch.empty_like(rounded)
    for rows, low, out in zip(*(t.split(max(1, PIECE_ELEMENTS // x.shape[1])) for t in (x, rounded, changes))):
        raised = scratch(x, *rows.shape).copy_(low)
        out.copy_(torch.sub(rows, raised, out=raised))
    return changes


def spectral_bound(X: Tensor) -> float:
    """No less than the largest singular value of X, bfloat16 [B, d]; no more than its Frobenius norm, about."""
    if X.numel() == 0:
        return 0.0
    low = X.t() @ X if X.shape[0] > X.shape[1] else X @ X.t()
    G = low.float()
    n = len(G)
    # what rounding moved G by: bfloat16, the sums over B (or d), and numbers too small for it
    total = float(G.diagonal().sum()) * MARGIN
    off = UNIT * float(torch.linalg.matrix_norm(G)) + 2 * max(X.shape) * (2.0**-24 * total + n * smallest_normal())
    guess = 1.05 * power_iteration(G)
    for _ in range(TRIES):
        if not 0 < guess < total:
            break
        above = -G
        above.diagonal().add_(guess)
        _, failed = torch.linalg.cholesky_ex(above)
        if not int(failed):
            # the backward error of the factor: n times gamma_(n + 1) of the largest diagonal
            return (MARGIN * (guess * (1 + n * (n + 2) * 2.0**-24) + off)) ** 0.5
        guess *= 1.3
    return (MARGIN * (total + off)) ** 0.5


def power_iteration(G: Tensor) -> float:
    """About the largest eigenvalue of a positive semidefinite matrix; never more."""
    v = G[:, int(G.diagonal().argmax())]
    for _ in range(POWER_STEPS):
        v = G @ (v / torch.linalg.vector_norm(v).clamp_min(1e-30))
    v = v / torch.linalg.vector_norm(v).clamp_min(1e-30)
    return float(v @ (G @ v))
