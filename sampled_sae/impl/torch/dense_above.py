"""Every activation above its threshold as a dense matrix [B, F], which a caller has asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...support.once_differentiable import once_differentiable
from ...support.reused_memory import on_huge_pages
from ..encoder import Operands
from ..gate import Gate, floor_of, keep_above_, magnitudes
from .above import FloorSearch, blocks_of_tokens, dense_activations, row_blocks
from .products import candidate_spans, raised

# a dictionary this small is multiplied as a whole
FEW_FEATURES = 4096


Fill = Callable[[Operands, Tensor, Gate | None], Tensor]


class DenseAbove(torch.autograd.Function):
    """Of x [B, d], which the operands hold without gradient, those above the threshold, by `fill`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operands: Operands, threshold: Tensor, gate: Gate | None, fill: Fill) -> Tensor:
        out = fill(operands, threshold, gate)
        ctx.save_for_backward(operands.W, operands.scale if gate is None else gate.gain, out)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        W, factor, out = ctx.saved_tensors
        dx = grad.new_zeros(len(grad), W.shape[1])
        for span in candidate_spans(Operands(dx, W, W[:, 0])):
            part = grad[:, span] * (out[:, span] > 0)
            if factor is not None:
                part *= factor[span]
            dx.addmm_(part, raised(W[span], dx))
        return dx.to(ctx.dtype), None, None, None, None


def fill_above(operands: Operands, threshold: Tensor, gate: Gate | None) -> Tensor:
    """[B, F]: from a list of entries where there are few, else from whole rows."""
    floor = floor_of(threshold, gate, operands.b.dtype)
    out = on_huge_pages(operands.b, operands.n_tokens, operands.n_features)
    search = FloorSearch(operands, floor)
    search.listing = operands.n_features > FEW_FEATURES
    for span, block in blocks_of_tokens(operands, search.room):
        rows = out[span]
        found = search.listed(block) if search.listing else None
        if found is not None:
            values, tokens, features = magnitudes(found, threshold, gate)
            rows.zero_()[tokens, features] = values
            continue
        for at, part in row_blocks(block):
            dense_activations(part, rows[at])
            keep_above_(rows[at], threshold, gate)
    return out
