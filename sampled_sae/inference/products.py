"""Dense products with weights of fewer bits than the activations, without a full copy of the weights."""

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
