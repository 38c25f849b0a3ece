"""A small pool as one block [B, P]: dense products, and a mask for what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...support.once_differentiable import once_differentiable
from ..encoder import Encoder
from ..hints import Rule

# Measured on a CPU: the block is up to a twentieth faster while P is a few times k, and a fifth slower at 32 k.
BLOCK_PER_K = 6
BLOCK_SHARE = 8


def use_block(pool: int, k: float, n_features: int) -> bool:
    """Whether [B, P] is the faster form and a small share of [B, F]."""
    return pool <= BLOCK_PER_K * k and pool * BLOCK_SHARE <= n_features


def block_codes(encoder: Encoder, members: Tensor, rule: Rule) -> SparseCodes:
    """What is kept inside a small pool, int64 [P]."""
    x, W, b, b_dec, _, rows, operands = encoder
    taken = rows.gather("W_enc", W, members, operands.x.dtype)
    b_taken = rows.gather("b_enc", b, members, operands.x.dtype)
    block = EncodeBlock.apply(x, b_dec, taken, b_taken, operands.x)
    if operands.scale is not None:
        block = block * operands.scale[members]
    kept = torch.where(rule.mask(block.detach()), block, 0)
    return SparseCodes.from_block(kept, members, operands.n_features)


class EncodeBlock(torch.autograd.Function):
    """(x - b_dec) rows^T + b_rows, [B, P], from x - b_dec as given in `centred`.

    The gradient of b_dec comes from that of b_rows, so that x needs none when it asks for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor | None, rows: Tensor, b_rows: Tensor, centred: Tensor) -> Tensor:
        ctx.save_for_backward(rows, centred)
        ctx.dtypes = x.dtype, None if b_dec is None else b_dec.dtype
        return torch.addmm(b_rows, centred, rows.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, centred = ctx.saved_tensors
        dx = db_dec = d_rows = None
        db_rows = grad.sum(0)
        if ctx.needs_input_grad[0]:
            dx = (grad @ rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            db_dec = -(db_rows @ rows).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            d_rows = grad.t() @ centred
        return dx, db_dec, d_rows, db_rows, None
