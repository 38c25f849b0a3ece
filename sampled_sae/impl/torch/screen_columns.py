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
from ..column_bounds import ColumnBounds
from ..encoder import Operands
from .products import chunk_width, token_blocks, without_autocast
from .scores import column_scores
from .screen import MARGIN, UNIT, FeatureRounding, entry_slack, smallest_normal

POWER_STEPS = 8
TRIES = 3


@without_autocast
def column_bounds(operands: Operands, score: str) -> ColumnBounds | None:
    """Of every feature; None for entropy, and where a bound would not be finite."""
    if operands.screen is None or score == "entropy" or not operands.screen.in_range:
        return None
    low, high = fires(operands) if score == "uniform" else norms(operands)
    if score == "l2_squared":
        low, high = low.square(), high.square()
    if not bool(high.isfinite().all()):
        return None
    full = operands.in_full()
    return ColumnBounds(low, high, lambda at: column_scores(full.of_features(at), score))


def norms(operands: Operands) -> tuple[Tensor, Tensor]:
    """(least, greatest) L2 norm of each column's activations."""
    (x, _, b, scale, *_), screen = operands, operands.screen
    assert screen is not None
    d = x.shape[1]
    change = x - screen.x
    rounded_change = change.bfloat16()
    tokens = spectral_bound(screen.x)
    changes = spectral_bound(rounded_change) + float(torch.linalg.vector_norm(change.sub_(rounded_change)))
    every, root = float(torch.linalg.vector_norm(screen.norms)), len(x) ** 0.5
    squares, errors = x.new_zeros(2, operands.n_features)
    for _, at, a, features in seen_chunks(operands):
        squares[at] += torch.linalg.vector_norm(a.relu_(), dim=1).square_()
        bound = tokens * features.errors + changes * features.norms + every * features.sum_errors(d)
        bound = MARGIN * bound + UNIT * root * b[at].abs()
        errors[at] = bound if scale is None else bound * scale[at]
    found = squares.sqrt_()
    # the rounding of z^, and that of the norm itself
    errors += (UNIT + len(x) * 2.0**-24) * found
    return (found - errors).clamp_min_(0), found + errors


def fires(operands: Operands) -> tuple[Tensor, Tensor]:
    """(least, greatest) uniform score of each column: 1 where an activation is above zero, else 0."""
    low, high = operands.x.new_zeros(2, operands.n_features)
    for block, at, a, features in seen_chunks(operands):
        slack = entry_slack(block, at, features)
        low[at] = torch.maximum(low[at], (a * (1 - 2 * UNIT) > slack).any(1).to(low.dtype))
        # a bound that is not a number rules nothing out
        high[at] = torch.maximum(high[at], (~(a < -slack)).any(1).to(high.dtype))
    return low, high


def seen_chunks(operands: Operands) -> Iterator[tuple[Operands, slice, Tensor, FeatureRounding]]:
    """(block of tokens, features, their activations before the relu [C, T], their rounding) from bfloat16 products."""
    n_features = operands.n_features
    for _, block in token_blocks(operands):
        _, W, b, scale, _, screen, _ = block
        assert screen is not None
        step = chunk_width(block)
        memory = scratch(operands.x, min(step, n_features), block.n_tokens)
        low = scratch(screen.x, min(step, n_features), block.n_tokens)
        for start in range(0, n_features, step):
            at = slice(start, min(start + step, n_features))
            features = FeatureRounding.of(W[at])
            z = low[: at.stop - start]
            torch.mm(features.W, screen.x.t(), out=z)
            a = memory[: at.stop - start].copy_(z).add_(b[at, None])
            if scale is not None:
                a.mul_(scale[at, None])
            yield block, at, a, features


def spectral_bound(X: Tensor) -> float:
    """No less than the largest singular value of X, bfloat16 [B, d]; no more than its Frobenius norm, about."""
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
        _, failed = torch.linalg.cholesky_ex(torch.eye(n, dtype=G.dtype, device=G.device) * guess - G)
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
