"""Dense products with weights of fewer bits than the activations, and norms of decoder rows, without full copies.

Norms are not remembered: weights may be changed in ways that nobody is told of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..support.once_differentiable import once_differentiable

# elements of the weights that are raised at once
CHUNK_ELEMENTS = 1 << 22


def product(a: Tensor, W: Tensor) -> Tensor:
    """a [B, n] times W^T, W [m, n]: [B, m], differentiable in a; equivalent to `a @ W.t().to(a.dtype)`."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ W.t() if W.dtype == a.dtype else RaisedProduct.apply(a, W)


class RaisedProduct(torch.autograd.Function):
    """A product with W raised to the dtype of a, some columns of W after others."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return raised_product(a, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return raised_product(grad, W.t()), None


def raised_product(a: Tensor, W: Tensor) -> Tensor:
    out = a.new_zeros(len(a), len(W))
    step = max(1, CHUNK_ELEMENTS // max(len(W), 1))
    for start in range(0, a.shape[1], step):
        at = slice(start, start + step)
        out.addmm_(a[:, at], W[:, at].to(a.dtype).t())
    return out


def decoder_norms(W_dec: Tensor, features: Tensor | None = None) -> Tensor:
    """[F] of the rows of W_dec [F, d], or [P] of those of the features, in at least float32."""
    rows = W_dec if features is None else W_dec.index_select(0, features)
    exact = torch.promote_types(W_dec.dtype, torch.float32)
    parts = rows.split(max(1, CHUNK_ELEMENTS // W_dec.shape[1]))
    return torch.cat([torch.linalg.vector_norm(part.to(exact), dim=1) for part in parts])


def unit_rows(W_dec: Tensor) -> Tensor:
    """float32 [F, d], rows divided by their norms, however large or small; a row of zeros stays one.

    Equivalent to `torch.nn.functional.normalize(W_dec, dim=1)`, whose squares overflow, underflow and meet its eps.
    """
    rows = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    greatest = rows.abs().amax(1, keepdim=True)
    return torch.nn.functional.normalize((rows / torch.where(greatest > 0, greatest, 1)).float(), dim=1)


def inverse_norms(W_dec: Tensor, features: Tensor | None = None) -> Tensor:
    """1 / norm; 0 for a row of zeros, which adds nothing."""
    norms = decoder_norms(W_dec, features)
    return torch.where(norms > 0, 1 / norms, 0)
