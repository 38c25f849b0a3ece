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
    V, *first = rounded_rows(G, trace[1:])
    V, *second = rounded_rows(product(V, V.t()))
    _, third, _ = rounded_rows(product(V, V.t()))
    return kernel.spectral_bound(trace, *first, *second, third, max(n_tokens, d), left)
