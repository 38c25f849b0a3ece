"""Codes and decode entry by entry, for large pools and for whole dictionaries, as operators.

Lists of kept entries are sorted by token, then feature, and have as many places as the budget; padding stands at the
end, with value 0, token B and feature F. Arguments named `*_receiver` are read for their shape alone: they receive the
gradient, of all F rows or of those of the features in `rows`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codes import Entries, PaddedEntries, SparseCodes
from ...kernels.gather_decode import entry_dots, gather_sum
from ...kernels.segment_sum import feature_order, segment_sum
from ...support.once_differentiable import no_second_derivative
from ..encoder import Encoder
from ..levels import level_of
from ..row_gradients import RowSource, note_norm
from .pool import top_pool
from .products import lowered, raised


def padded_codes(encoder: Encoder, found: Entries, members: Tensor | None) -> SparseCodes:
    """Entries in a list of fixed length, tokens and features int32, with their gradient attached."""
    x, W, b, b_dec, _, rows, operands = encoder
    values, *where = by_feature(found, members, *encoder.shape)
    W_receiver, b_receiver = (receiver(rows, name, t, where[-1]) for name, t in (("W_enc", W), ("b_enc", b)))
    values = entry_values(x, b_dec, W_receiver, b_receiver, values, operands.x, operands.W, operands.scale, *where)
    return SparseCodes.from_padded(PaddedEntries(values, *where), encoder.shape)


def by_feature(found: Entries, members: Tensor | None, n_tokens: int, n_features: int) -> PaddedEntries:
    """Entries sorted by token, and by feature for the backward pass."""
    values, tokens, features = found
    every_token = torch.arange(n_tokens + 1, dtype=torch.int32, device=tokens.device)
    token_ends = torch.searchsorted(tokens, every_token, out_int32=True)
    rows = gradient_rows(features, members, n_features)
    order, row_ends = feature_order(features, rows)
    return PaddedEntries(values, tokens, features, token_ends, order, row_ends, rows)


def gradient_rows(features: Tensor, members: Tensor | None, n_features: int) -> Tensor:
    """Distinct features int64 [R], ascending, that include all in the list; R follows from the sizes alone.

    The candidates themselves, or where these outnumber the list's places as many features as it has places.
    """
    n_places = len(features)
    if members is not None and len(members) <= n_places:
        return members
    if n_features <= n_places:
        return torch.arange(n_features, device=features.device)
    touched = torch.zeros(n_features + 1, device=features.device).index_fill_(0, features.long(), 1.0)
    return top_pool(touched[:-1], n_places)


def decode_codes(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource, dtype: torch.dtype
) -> Tensor:
    """sum_j c_ij W_dec_j + b_dec, fp32 [B, d]; rows of W_dec are read in `dtype`."""
    padded = codes.padded
    if padded is None:
        padded = by_feature(narrow(codes.entries()), None, *codes.shape)
    values, *where = padded
    W_receiver = receiver(rows, "W_dec", W_dec, padded.rows)
    b_dec = None if b_dec is None else b_dec.contiguous()
    return decode_entries(values, W_receiver, b_dec, rows.rounded.of("W_dec", W_dec, dtype), *where)


def of_levels(codes: SparseCodes, groups: Sequence[int]) -> SparseCodes:
    """The same entries, where each token counts as G: those of its level, by feature, stand side by side."""
    padded = codes.padded if codes.padded is not None else by_feature(narrow(codes.entries()), None, *codes.shape)
    n_tokens = codes.shape[0] * len(groups)
    tokens = (padded.tokens * len(groups) + level_of(padded.features, groups)).clamp(max=n_tokens)
    every_token = torch.arange(n_tokens + 1, dtype=torch.int32, device=tokens.device)
    token_ends = torch.searchsorted(tokens, every_token, out_int32=True)
    apart = PaddedEntries(padded.values, tokens, padded.features, token_ends, *padded[4:])
    return SparseCodes.from_padded(apart, (n_tokens, codes.shape[1]))


def narrow(entries: Entries) -> Entries:
    """fp32 and int32, as the kernels read them."""
    return Entries(entries.values.float(), entries.tokens.int(), entries.features.int())


def receiver(rows: RowSource, name: str, W: Tensor, features: Tensor) -> Tensor:
    """Where an operator sends its gradient: W itself, or rows of it."""
    return rows.receiver(name, W, features, W.dtype) if rows.keep else W


@torch.library.custom_op("sampled_sae::entry_values", mutates_args=())
def entry_values(
    x: Tensor,
    b_dec: Tensor | None,
    W_receiver: Tensor,
    b_receiver: Tensor,
    values: Tensor,
    centred: Tensor,
    W: Tensor,
    scale: Tensor | None,
    tokens: Tensor,
    features: Tensor,
    token_ends: Tensor,
    order: Tensor,
    row_ends: Tensor,
    rows: Tensor,
) -> Tensor:
    """The kept values again, as functions of x, b_dec, W_receiver and b_receiver, which receive the gradient.

    A receiver of F rows gets the dense gradient, any other that of the features in `rows`, row by row.
    """
    return values.clone()


@entry_values.register_fake
def _(x: Tensor, b_dec: Tensor | None, W_receiver: Tensor, b_receiver: Tensor, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("sampled_sae::entry_values_backward", mutates_args=())
def entry_values_backward(
    grad: Tensor,
    centred: Tensor,
    W: Tensor,
    scale: Tensor | None,
    tokens: Tensor,
    features: Tensor,
    token_ends: Tensor,
    order: Tensor,
    row_ends: Tensor,
    rows: Tensor,
    n_receiver: int,
    want_x: bool,
    want_b_dec: bool,
    want_W: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, d b_dec, d W_receiver, d b_receiver, norm of d W_receiver) in fp32; what is not wanted is empty."""
    grad = grad.contiguous()
    if scale is not None:
        grad = grad * scale.index_select(0, features.long().clamp(max=len(scale) - 1))
    empty = grad.new_empty(0)
    dx = gather_sum(grad, features, token_ends, W, None) if want_x else empty
    source = centred if want_W else centred[:, :1]
    place = rows if n_receiver == W.shape[0] and n_receiver != len(rows) else None
    norm = grad.new_empty(())
    of_W = norm if want_W else None
    d_W, d_b = segment_sum(grad, tokens, order, row_ends, source, place, n_receiver, with_sums=True, norm=of_W)
    assert d_b is not None
    some_rows = rows if n_receiver != W.shape[0] else None
    db_dec = -weighted_row_sum(d_b, W, some_rows) if want_b_dec else empty.clone()
    return dx, db_dec, d_W if want_W else empty.clone(), d_b, norm


@entry_values_backward.register_fake
def _(grad: Tensor, centred: Tensor, W: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_receiver, want_x, want_b_dec, want_W = rest[-4:]
    d = W.shape[1]
    return (
        grad.new_empty(centred.shape if want_x else 0),
        grad.new_empty(d if want_b_dec else 0),
        grad.new_empty((n_receiver, d) if want_W else 0),
        grad.new_empty(n_receiver),
        grad.new_empty(()),
    )


def weighted_row_sum(weights: Tensor, W: Tensor, rows: Tensor | None) -> Tensor:
    """sum_r weights_r W_(rows_r), fp32 [d]: one long segment, summed in balanced pieces."""
    every = torch.arange(len(weights), dtype=torch.int32, device=W.device)
    ends = torch.arange(2, dtype=torch.int32, device=W.device) * len(weights)
    places = every if rows is None else rows.int()
    return segment_sum(weights, places, every, ends, W, None, 1)[0][0]


def _entry_values_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, b_dec, W_receiver, b_receiver, _, *saved = inputs
    ctx.save_for_backward(*saved)
    ctx.receiver, ctx.n_receiver = weakref.ref(W_receiver), W_receiver.shape[0]
    ctx.dtypes = x.dtype, None if b_dec is None else b_dec.dtype, W_receiver.dtype, b_receiver.dtype


def _entry_values_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_x, want_b_dec, want_W, want_b = ctx.needs_input_grad[:4]
    x_dtype, b_dec_dtype, W_dtype, b_dtype = ctx.dtypes
    wanted = ctx.n_receiver, want_x, want_b_dec, want_W
    dx, db_dec, d_W, d_b, norm = entry_values_backward(grad, *ctx.saved_tensors, *wanted)
    tell_norm(ctx.receiver, d_W, norm)
    return (
        dx.to(x_dtype) if want_x else None,
        db_dec.to(b_dec_dtype) if want_b_dec else None,
        d_W.to(W_dtype) if want_W else None,
        d_b.to(b_dtype) if want_b else None,
        *(None,) * 10,
    )


def tell_norm(receiver: weakref.ref[Tensor], gradient: Tensor, norm: Tensor) -> None:
    """To the tensor that receives the gradient, where that is still there."""
    tensor = receiver()
    if tensor is not None:
        note_norm(tensor, gradient, norm)


@torch.library.custom_op("sampled_sae::decode_entries", mutates_args=())
def decode_entries(
    values: Tensor,
    W_receiver: Tensor,
    b_dec: Tensor | None,
    W: Tensor,
    tokens: Tensor,
    features: Tensor,
    token_ends: Tensor,
    order: Tensor,
    row_ends: Tensor,
    rows: Tensor,
) -> Tensor:
    """sum_j values_ij W_j + b_dec, fp32 [B, d]; W_receiver as in `entry_values`."""
    return gather_sum(values, features, token_ends, W, b_dec)


@decode_entries.register_fake
def _(
    values: Tensor, W_receiver: Tensor, b_dec: Tensor | None, W: Tensor, tokens: Tensor, features: Tensor, *ends: Tensor
) -> Tensor:
    return values.new_empty(ends[0].shape[0] - 1, W.shape[1])


@torch.library.custom_op("sampled_sae::decode_entries_backward", mutates_args=())
def decode_entries_backward(
    grad: Tensor,
    values: Tensor,
    W: Tensor,
    tokens: Tensor,
    features: Tensor,
    token_ends: Tensor,
    order: Tensor,
    row_ends: Tensor,
    rows: Tensor,
    n_receiver: int,
    want_values: bool,
    want_W: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d values, d W_receiver, its norm) in fp32; what is not wanted is empty."""
    low, factor = lowered(grad.contiguous(), W.dtype)
    empty = grad.new_empty(0)
    d_values = raised(entry_dots(low, W, tokens, features, token_ends), factor) if want_values else empty
    norm = grad.new_empty(())
    if not want_W:
        return d_values, empty.clone(), norm
    place = rows if n_receiver == W.shape[0] and n_receiver != len(rows) else None
    d_W, _ = segment_sum(values, tokens, order, row_ends, low, place, n_receiver, norm=norm)
    return d_values, raised(d_W, factor), raised(norm, factor)


@decode_entries_backward.register_fake
def _(grad: Tensor, values: Tensor, W: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    n_receiver, want_values, want_W = rest[-3:]
    return (
        torch.empty_like(values) if want_values else grad.new_empty(0),
        grad.new_empty((n_receiver, W.shape[1]) if want_W else 0),
        grad.new_empty(()),
    )


def _decode_entries_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, W_receiver, b_dec, *saved = inputs
    ctx.save_for_backward(values, *saved)
    ctx.receiver, ctx.n_receiver = weakref.ref(W_receiver), W_receiver.shape[0]
    ctx.dtypes = W_receiver.dtype, None if b_dec is None else b_dec.dtype


def _decode_entries_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    want_values, want_W, want_b_dec = ctx.needs_input_grad[:3]
    W_dtype, b_dec_dtype = ctx.dtypes
    d_values, d_W, norm = decode_entries_backward(grad, *ctx.saved_tensors, ctx.n_receiver, want_values, want_W)
    tell_norm(ctx.receiver, d_W, norm)
    return (
        d_values if want_values else None,
        d_W.to(W_dtype) if want_W else None,
        grad.sum(0).to(b_dec_dtype) if want_b_dec else None,
        *(None,) * 7,
    )


entry_values.register_autograd(_entry_values_gradient, setup_context=_entry_values_context)
decode_entries.register_autograd(_decode_entries_gradient, setup_context=_decode_entries_context)
for _backward in (entry_values_backward, decode_entries_backward):
    _backward.register_autograd(no_second_derivative)
