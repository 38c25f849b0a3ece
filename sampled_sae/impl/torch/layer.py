"""The steps of METHOD.md put together from scores, block, stream and entries.

A small pool is computed as one block [B, P] with dense products; a large one is streamed and handled entry by
entry. Dense wins while P is a few times k (measured: benchmarks/results/block_or_entries.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...codes import Selection, SparseCodes
from ...config import batch_budget
from ..row_gradients import RowSource
from .entries import DecodeEntries, EncodeEntries, EntryIndex
from .pool import candidate_pool, largest_mask, nth_largest_of_rows
from .scores import column_statistics, finish_scores
from .stream import Entries, batch_hint, stream_above, stream_batch, stream_token, token_hint

__all__ = ["above_threshold", "candidate_pool", "centre", "column_scores", "decode", "select"]

BLOCK_PER_K = 6
BLOCK_SHARE = 8


def use_block(pool: int, k: float, n_features: int) -> bool:
    """Whether [B, P] is the faster form and a small share of [B, F]."""
    return pool <= BLOCK_PER_K * k and pool * BLOCK_SHARE <= n_features


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """This form computes in float32 for 16-bit inputs, and autocast would round one operand of a product."""

    @functools.wraps(function)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return call


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


def centre(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """x - b_dec without a gradient, in the dtype to compute in: float32 for 16-bit inputs."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    centred = x.detach().to(dtype)
    return centred if b_dec is None else centred - b_dec.detach().to(dtype)


@without_autocast
def column_scores(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    """[F] of x [B, d], already centred."""
    x = centre(x, None)
    scale = None if scale is None else scale.detach().to(x.dtype)
    return finish_scores(column_statistics(x, W.detach(), b.detach().to(x.dtype), score, scale), score)


@without_autocast
def select(
    x: Tensor,
    b_dec: Tensor | None,
    centred: Tensor,
    W: Tensor,
    b: Tensor,
    members: Tensor | None,
    *,
    k: float,
    select: str = "batch",
    scale: Tensor | None = None,
    hint: float | None = None,
    rows: RowSource | None = None,
) -> Selection:
    """What x [B, d] keeps under W [F, d], b [F] inside the pool `members` [P], or everywhere for None.

    centred: `centre(x, b_dec)`. hint: that of the last batch under the same rule.
    """
    rows = rows if rows is not None else RowSource()
    weights, bias = W.detach(), b.detach().to(centred.dtype)
    scale = None if scale is None else scale.detach().to(centred.dtype)
    n_features = W.shape[0]
    if members is not None and use_block(len(members), k, n_features):
        taken = rows.gather("W_enc", W, members, centred.dtype)
        b_taken = rows.gather("b_enc", b, members, centred.dtype)
        block = EncodeBlock.apply(x, b_dec, taken, b_taken, centred)
        if scale is not None:
            block = block * scale[members]
        mask = block_mask(block.detach(), k, select)
        return Selection(SparseCodes.from_block(torch.where(mask, block, 0), members, n_features), None)
    if select == "batch":
        budget = batch_budget(x.shape[0], k)
        found = stream_batch(centred, weights, bias, scale, members, budget, hint)
        hint = batch_hint(found, budget)
    else:
        found = stream_token(centred, weights, bias, scale, members, int(k), hint)
        hint = token_hint(found, centred, int(k))
    return Selection(entry_codes(x, b_dec, W, b, centred, scale, found, rows), hint)


@without_autocast
def above_threshold(x: Tensor, b_dec: Tensor | None, W: Tensor, b: Tensor, threshold: Tensor) -> SparseCodes:
    """Every activation strictly above the threshold (0-dim), with its gradient."""
    centred = centre(x, b_dec)
    threshold = threshold.to(centred.dtype)
    least = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
    found = stream_above(centred, W.detach(), b.detach().to(centred.dtype), None, None, float(least))
    return entry_codes(x, b_dec, W, b, centred, None, found, RowSource())


def entry_codes(
    x: Tensor,
    b_dec: Tensor | None,
    W: Tensor,
    b: Tensor,
    centred: Tensor,
    scale: Tensor | None,
    found: Entries,
    rows: RowSource,
) -> SparseCodes:
    """Selected entries with their gradient attached."""
    values, tokens, features = found
    codes = SparseCodes(values, tokens, features, (x.shape[0], W.shape[0]))
    index = entry_index(codes, rows)
    if torch.is_grad_enabled():
        W_rows = rows.slot("W_enc", W, index.touched, centred.dtype)
        b_rows = rows.slot("b_enc", b, index.touched, centred.dtype)
        values = EncodeEntries.apply(x, b_dec, W_rows, b_rows, values, centred, W.detach(), scale, index)
        codes = SparseCodes(values, tokens, features, codes.shape)
        codes.index = index
    return codes


def entry_index(codes: SparseCodes, rows: RowSource) -> EntryIndex:
    """The codes' index, made once."""
    if codes.index is None:
        codes.index = EntryIndex(codes.tokens, codes.features, *codes.shape, rows.workspace)
    return codes.index


def block_mask(a: Tensor, k: float, select: str) -> Tensor:
    """Kept entries of a [B, P]: strictly positive, within the budget, ties to the lower index."""
    positive = a > 0
    if select == "batch":
        budget = batch_budget(a.shape[0], k)
        if int(positive.count_nonzero()) <= budget:
            return positive
        return largest_mask(a.flatten(), budget).view(a.shape) & positive
    if k >= a.shape[1]:
        return positive
    cut = nth_largest_of_rows(a, int(k))[:, None]
    within = a >= cut
    if int(within.count_nonzero()) == int(k) * a.shape[0]:
        return within & positive
    above = a > cut
    tied = a == cut
    room = int(k) - above.sum(1, keepdim=True)
    return (above | (tied & (tied.cumsum(1) <= room))) & positive


@without_autocast
def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
    """[B, d] in the codes' dtype: a dense product on a block, gathered rows on entries."""
    rows = rows if rows is not None else RowSource()
    if codes.block is not None:
        assert codes.pool is not None
        x_hat = codes.block @ rows.gather("W_dec", W_dec, codes.pool, codes.block.dtype)
    else:
        index = entry_index(codes, rows)
        slot = rows.slot("W_dec", W_dec, index.touched, codes.values.dtype)
        x_hat = DecodeEntries.apply(codes.values, slot, W_dec.detach(), index)
    return x_hat if b_dec is None else x_hat + b_dec.to(x_hat.dtype)
