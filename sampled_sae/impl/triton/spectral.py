"""How far tokens may stretch a feature's weights: bounds on singular values, made and kept on the device."""

from __future__ import annotations

from torch import Tensor

from ...kernels import spectral_bound as kernel
from ...kernels.rounded_rows import rounded_rows
from .products import product
from .screen import RoundedRows


def stretches(tokens: RoundedRows, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Of x^, the rounded tokens, and of `changes`, float32 [B, d], what rounding changed: float32 [2] each.

    The first number is no less than the largest singular value, the second no less than the Frobenius norm.
    """
    again = RoundedRows(*rounded_rows(changes))
    return stretch(tokens), stretch(again, again.errors)


def stretch(rows: RoundedRows, left: Tensor | None = None) -> Tensor:
    """Of `rows.values`, bfloat16 [B, d]; of the first number, with what is added to them, rows of norms `left` [B]."""
    X = rows.values
    trace = kernel.trace_bound(rows.norms, rows.errors)
    n_tokens, d = X.shape
    G = product(X.t(), X) if n_tokens > d else product(X, X.t())
    V, norms_1, errors_1 = rounded_rows(G, trace[1:])
    V, norms_2, errors_2 = rounded_rows(product(V, V.t()))
    _, norms_3, _ = rounded_rows(product(V, V.t()))
    n = max(n_tokens, d)
    return kernel.spectral_bound(trace, norms_1, errors_1, norms_2, errors_2, norms_3, n, left)
