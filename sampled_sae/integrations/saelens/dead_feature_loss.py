"""SAELens' auxiliary loss, token by token: the k largest activations among the dead features explain the residual.

Unlike that of docs/method.md it takes activations before the relu, so that negative ones take part where few are
positive, is not divided by the residual's variance, and its gradient reaches b_dec.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...codes import Entries
from ...impl.encoder import Encoder
from ...impl.interface import implementation
from ...support.nth_largest import nth_largest_of_rows
from ...support.reused_memory import scratch

DENSE_PER_K = 6
# on a CPU a chunk stays in its cache; a GPU's is large enough that its launches do not count
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 20, 1 << 25


def dead_reconstruction_loss(encoder: Encoder, W_dec: Tensor, residual: Tensor, members: Tensor, k: int) -> Tensor:
    """mean over tokens of ||residual - e_hat||^2, e_hat the reconstruction by `members` alone, 0-dim, at least float32.

    Equivalent to `a = (x - b_dec) @ W[members].T + b[members]; e_hat = keep_top_k(a, by=a * scale) @ W_dec[members]`.

    Args:
        encoder: of the batch.
        W_dec: [F, d].
        residual: [B, d], no gradient.
        members: int64 [D], the dead features, ascending.
        k: entries a token, 1 <= k <= D, those of the largest activation times the encoder's scale.
    """
    with torch.autocast(residual.device.type, enabled=False):
        parts = implementation("torch")
        x, W, b, b_dec, scale, rows, _ = encoder
        # in float32 at least, whatever the form of the step
        exact = parts.encoder(x, W, b, b_dec, None, rows)
        centred = exact.operands.x
        residual = residual.to(centred.dtype)
        scale = None if scale is None else scale[members].to(centred.dtype)
        if len(members) <= DENSE_PER_K * k:
            taken = rows.gather("W_enc", W, members, centred.dtype)
            b_taken = rows.gather("b_enc", b, members, centred.dtype)
            decoder = rows.gather("W_dec", W_dec, members, centred.dtype)
            return DeadReconstruction.apply(x, b_dec, taken, b_taken, decoder, residual, centred, scale, k)
        some = exact.operands.of_features(members)
        found = [
            largest(a, tokens.start, scale, k) for tokens, a in activations(some.x, some.W.to(some.x.dtype), some.b)
        ]
        values, tokens, columns = (torch.cat(column) for column in zip(*found))
        codes = parts.encode_at(exact, Entries(values, tokens, members[columns]))
        return (parts.decode(codes, W_dec, None, rows) - residual).square().sum(-1).mean()


class DeadReconstruction(torch.autograd.Function):
    """The loss from dense products on [tokens of a chunk, D], with its gradient found on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b_dec: Tensor | None,
        W: Tensor,
        b: Tensor,
        W_dec: Tensor,
        residual: Tensor,
        centred: Tensor,
        scale: Tensor | None,
        k: int,
    ) -> Tensor:
        dx = torch.empty_like(centred) if ctx.needs_input_grad[0] else None
        dW, db, dW_dec = torch.zeros_like(W), torch.zeros_like(b), torch.zeros_like(W_dec)
        total = centred.new_zeros(())
        for tokens, a in activations(centred, W, b):
            mask = None if k == a.shape[1] else largest_mask_of_rows(a, scale, k)
            if mask is not None:
                a.mul_(mask)
            error = torch.addmm(residual[tokens], a, W_dec, beta=-1)
            total += error.square().sum()
            if any(ctx.needs_input_grad):
                error.mul_(2 / len(centred))
                dW_dec.addmm_(a.t(), error)
                da = torch.mm(error, W_dec.t(), out=a)
                if mask is not None:
                    da.mul_(mask)
                dW.addmm_(da.t(), centred[tokens])
                db.add_(da.sum(0))
                if dx is not None:
                    torch.mm(da, W, out=dx[tokens])
        db_dec = -(db @ W) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(dx, db_dec, dW, db, dW_dec)
        ctx.dtypes = x.dtype, None if b_dec is None else b_dec.dtype
        return total / len(centred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, db_dec, *weights = ctx.saved_tensors
        dx = None if dx is None else (dx * grad).to(ctx.dtypes[0])
        db_dec = None if db_dec is None else (db_dec * grad).to(ctx.dtypes[1])
        return dx, db_dec, *(w * grad for w in weights), None, None, None, None


def activations(x: Tensor, W: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, x W^T + b of them [C, D]) chunk by chunk, all in one buffer."""
    elements = CPU_CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, elements // len(W))
    buffer = scratch(x, min(step, len(x)), len(W))
    for first in range(0, len(x), step):
        tokens = slice(first, min(first + step, len(x)))
        yield tokens, torch.addmm(b, x[tokens], W.t(), out=buffer[: tokens.stop - first])


def largest_mask_of_rows(a: Tensor, scale: Tensor | None, k: int) -> Tensor:
    """Mask of the k largest of each row of a * scale, ties to the lower column."""
    weighted = a if scale is None else a * scale
    cut = nth_largest_of_rows(weighted, k)[:, None]
    mask = weighted >= cut
    # other devices would have to be waited for
    if a.device.type == "cpu" and int(mask.count_nonzero()) == k * len(a):
        return mask
    above = weighted > cut
    tied = mask & ~above
    return above | (tied & (tied.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))


def largest(a: Tensor, first: int, scale: Tensor | None, k: int) -> Entries:
    """(values, tokens, columns) of the k largest of each row; the rows are the tokens from `first` on."""
    at = largest_mask_of_rows(a, scale, k).flatten().nonzero().squeeze(1)
    tokens, columns = at // a.shape[1], at % a.shape[1]
    return Entries(a.flatten().index_select(0, at), tokens + first, columns)
