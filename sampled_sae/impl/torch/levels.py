"""The nested reconstructions of a Matryoshka SAE, [B, G, d], at about the cost of one.

Every entry is decoded once, into the level of its feature; a level is what its own features add to the one before.
Backward goes the other way: a row of a level's gradient is the sum of those of the level itself and all above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...support.once_differentiable import once_differentiable
from ...support.reused_memory import Workspace
from ..levels import level_of
from ..row_gradients import RowSource
from .entries import EntryIndex, entry_index, receiver


def decode_entry_levels(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int], rows: RowSource
) -> Tensor:
    """Of listed entries: those of a token are sorted by feature, so that those of a level stand side by side."""
    index = LevelIndex(entry_index(codes, rows), level_of(codes.features, groups), len(groups))
    W_rows = receiver(rows, "W_dec", W_dec, index, codes.values.dtype)
    return DecodeEntryLevels.apply(codes.values, W_rows, W_dec.detach(), b_dec, index, len(groups))


def decode_block_levels(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int], rows: RowSource
) -> Tensor:
    """Of a block [B, P]: its features ascend, so that those of a level are columns side by side."""
    assert codes.block is not None
    assert codes.pool is not None
    taken = rows.gather("W_dec", W_dec, codes.pool, codes.block.dtype)
    ends = torch.searchsorted(codes.pool, torch.tensor(groups, device=codes.pool.device)).tolist()
    return DecodeBlockLevels.apply(codes.block, taken, b_dec, [0, *ends], rows.workspace)


class LevelIndex(EntryIndex):
    """The same entries where each token counts as G, one a level; level int64 [n] ascends within a token."""

    def __init__(self, index: EntryIndex, level: Tensor, n_levels: int) -> None:
        n_tokens, tokens = index.n_tokens * n_levels, index.tokens * n_levels + level
        super().__init__(tokens, index.features, n_tokens, index.n_features, index.workspace)
        self._index = index

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._index.by_feature

    @cached_property
    def feature_ends(self) -> Tensor:
        return self._index.feature_ends


def summed_from_above(grad: Tensor, workspace: Workspace) -> Tensor:
    """The gradient of what each level adds, [B, G, d], from that of the levels."""
    last = grad.shape[1] - 1
    total = workspace.empty(grad, *grad.shape)
    total[:, last] = grad[:, last]
    for m in range(last, 0, -1):
        torch.add(grad[:, m - 1], total[:, m], out=total[:, m - 1])
    return total


class DecodeEntryLevels(torch.autograd.Function):
    """Levels [B, G, d] of entries whose index counts each level of a token as a token; see `DecodeEntries`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_rows: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor | None,
        index: EntryIndex,
        n_levels: int,
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.index, ctx.b_dtype = index, None if b_dec is None else b_dec.dtype
        levels = index.sum_by_token(values, W_dec).view(index.n_tokens // n_levels, n_levels, W_dec.shape[1])
        if b_dec is not None:
            levels[:, 0] += b_dec.to(levels.dtype)
        # what each level adds becomes the sum of it and all before it
        for m in range(1, n_levels):
            levels[:, m] += levels[:, m - 1]
        return levels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        index: EntryIndex = ctx.index
        total = summed_from_above(grad, index.workspace)
        by_level = total.flatten(0, 1)
        dvalues = index.dots(by_level, W_dec) if ctx.needs_input_grad[0] else None
        dW_rows = index.sum_by_feature(values, by_level) if ctx.needs_input_grad[1] else None
        db_dec = total[:, 0].sum(0).to(ctx.b_dtype) if ctx.needs_input_grad[3] else None
        return dvalues, dW_rows, None, db_dec, None, None


class DecodeBlockLevels(torch.autograd.Function):
    """Levels [B, G, d] of a block [B, P] and its rows of W_dec [P, d]; level m has the columns ends[m] to ends[m+1]."""

    @staticmethod
    def forward(
        ctx: Any, block: Tensor, rows: Tensor, b_dec: Tensor | None, ends: list[int], workspace: Workspace
    ) -> Tensor:
        ctx.save_for_backward(block, rows)
        ctx.ends, ctx.workspace, ctx.b_dtype = ends, workspace, None if b_dec is None else b_dec.dtype
        levels = workspace.empty(block, len(block), len(ends) - 1, rows.shape[1])
        before = rows.new_zeros(1, rows.shape[1]) if b_dec is None else b_dec.to(rows.dtype)[None]
        for m, (start, end) in enumerate(pairwise(ends)):
            before = torch.addmm(before, block[:, start:end], rows[start:end], out=levels[:, m])
        return levels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, rows = ctx.saved_tensors
        total = summed_from_above(grad, ctx.workspace)
        d_block, d_rows = (
            torch.empty_like(t) if want else None for t, want in zip((block, rows), ctx.needs_input_grad)
        )
        for m, (start, end) in enumerate(zip(ctx.ends, ctx.ends[1:])):
            if d_block is not None:
                d_block[:, start:end] = total[:, m] @ rows[start:end].t()
            if d_rows is not None:
                d_rows[start:end] = block[:, start:end].t() @ total[:, m]
        db_dec = total[:, 0].sum(0).to(ctx.b_dtype) if ctx.needs_input_grad[2] else None
        return d_block, d_rows, db_dec, None, None
