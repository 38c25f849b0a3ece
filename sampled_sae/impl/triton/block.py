"""Selection and decode of a small pool as dense products on the masked block [B, P], as operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...kernels.batch_topk import keep_largest_
from ...kernels.block_gradient import block_gradient
from ...kernels.token_topk import keep_rows_
from ...support.once_differentiable import no_second_derivative
from ..encoder import Encoder
from ..hints import Rule
from ..row_gradients import RowSource
from .products import lowered, product, raised

# candidates of a pool that is handled as one block
BLOCK_FEATURES = 8192


def block_codes(encoder: Encoder, members: Tensor, rule: Rule, b: Tensor | None = None) -> SparseCodes:
    """The kept entries of a small pool, int64 [P]; `b` [F] stands in for the encoder's."""
    x, W, bias, b_dec, _, rows, operands = encoder
    taken = gather(rows, "W_enc", W, members)
    b_taken = gather(rows, "b_enc", bias if b is None else b, members)
    scale = None if operands.scale is None else operands.scale.index_select(0, members)
    per_token = rule.select == "token"
    budget = int(rule.k) if per_token else rule.budget(operands.n_tokens)
    block, low, least = select_block(x, b_dec, taken, b_taken, operands.x, scale, budget, per_token)
    return SparseCodes.from_block(block, members, operands.n_features, low, None if per_token else least)


def decode_codes(codes: SparseCodes, W_dec: Tensor, rows: RowSource, dtype: torch.dtype) -> Tensor:
    """block W_dec[pool], fp32 [B, d]; products take operands of `dtype`."""
    assert codes.block is not None
    assert codes.pool is not None
    block = codes.block.float()
    low = codes.low_block
    if low is None or (low.numel() == 0) != (dtype == torch.float32) or low.dtype != dtype:
        low = block.detach().to(dtype) if dtype != torch.float32 else block.new_empty(0)
    return decode_block(block, low, gather(rows, "W_dec", W_dec, codes.pool))


def of_levels(codes: SparseCodes, groups: Sequence[int]) -> SparseCodes:
    """The block [B * G, P]: of each token once for every g of `groups` the columns of the first g features.

    Where they end in a pool only the device knows, so that each level's product has the size of all.
    """
    assert codes.block is not None
    assert codes.pool is not None
    inside = torch.stack([codes.pool < g for g in groups])
    block = torch.where(inside, codes.block[:, None], 0).flatten(0, 1)
    return SparseCodes.from_block(block, codes.pool, codes.shape[1])


def gather(rows: RowSource, name: str, W: Tensor, features: Tensor) -> Tensor:
    """W[features]; its gradient goes to W, or to `rows` where rows are wanted."""
    return rows.gather(name, W, features, W.dtype) if rows.keep else W.index_select(0, features)


@torch.library.custom_op("sampled_sae::select_block", mutates_args=())
def select_block(
    x: Tensor,
    b_dec: Tensor | None,
    rows: Tensor,
    b_rows: Tensor,
    centred: Tensor,
    scale: Tensor | None,
    budget: int,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(centred rows^T + b_rows) * scale, [B, P], zero but for the entries that are kept.

    Returns it in fp32, and once more in the dtype of `centred` where that has 16 bits (else an empty tensor). Then,
    fp32 [1], the smallest of the entries, inf where there is none, and always where each token has a budget.
    """
    block = product(centred, rows.to(centred.dtype).t())
    low = torch.empty_like(block, dtype=centred.dtype) if centred.dtype != torch.float32 else None
    least = block.new_full((1,), torch.inf)
    bias, scale = b_rows.float(), None if scale is None else scale.float()
    if per_token:
        keep_rows_(block, budget, bias, scale, low)
    else:
        keep_largest_(block, budget, bias, scale, low, least)
    return block, centred.new_empty(0) if low is None else low, least


@select_block.register_fake
def _(
    x: Tensor, b_dec: Tensor | None, rows: Tensor, b_rows: Tensor, centred: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (centred.shape[0], rows.shape[0])
    low = centred.new_empty(0 if centred.dtype == torch.float32 else shape)
    return centred.new_empty(shape, dtype=torch.float32), low, centred.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("sampled_sae::select_block_backward", mutates_args=())
def select_block_backward(
    grad: Tensor, block: Tensor, rows: Tensor, centred: Tensor, scale: Tensor | None, want_x: bool, want_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, d rows, d b_rows) in fp32; what is not wanted is empty."""
    dtype = centred.dtype
    # to float16 only once its largest entry is known
    masked, sums = block_gradient(grad, block, scale, torch.float32 if dtype == torch.float16 else dtype)
    low, factor = lowered(masked, dtype)
    empty = grad.new_empty(0)
    dx = raised(product(low, rows.to(centred.dtype)), factor) if want_x else empty
    d_rows = raised(product(low.t(), centred), factor) if want_rows else empty.clone()
    return dx, d_rows, sums


@select_block_backward.register_fake
def _(
    grad: Tensor, block: Tensor, rows: Tensor, centred: Tensor, scale: Tensor | None, want_x: bool, want_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad.new_empty(centred.shape if want_x else 0)
    return dx, grad.new_empty(rows.shape if want_rows else 0), grad.new_empty(rows.shape[0])


def _select_block_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, b_dec, rows, b_rows, centred, scale, _, _ = inputs
    ctx.save_for_backward(output[0], rows, centred, scale)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if b_dec is None else b_dec.dtype, rows.dtype, b_rows.dtype


def _select_block_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    block, rows, centred, scale = ctx.saved_tensors
    want_x, want_b_dec, want_rows, want_b_rows = ctx.needs_input_grad[:4]
    x_dtype, b_dec_dtype, rows_dtype, b_rows_dtype = ctx.dtypes
    dx, d_rows, db_rows = select_block_backward(grad, block, rows, centred, scale, want_x, want_rows)
    return (
        dx.to(x_dtype) if want_x else None,
        # that of b_dec follows from that of b_rows, so that x needs none when it asks for none
        -(db_rows @ rows.float()).to(b_dec_dtype) if want_b_dec else None,
        d_rows.to(rows_dtype) if want_rows else None,
        db_rows.to(b_rows_dtype) if want_b_rows else None,
        None,
        None,
        None,
        None,
    )


@torch.library.custom_op("sampled_sae::decode_block", mutates_args=())
def decode_block(block: Tensor, low: Tensor, rows: Tensor) -> Tensor:
    """block rows, fp32 [B, d]; `low` stands in for the block in a 16-bit product, and is empty for fp32."""
    factor = low if low.numel() else block
    return product(factor, rows.to(factor.dtype))


@decode_block.register_fake
def _(block: Tensor, low: Tensor, rows: Tensor) -> Tensor:
    return block.new_empty(block.shape[0], rows.shape[1])


@torch.library.custom_op("sampled_sae::decode_block_backward", mutates_args=())
def decode_block_backward(
    grad: Tensor, block: Tensor, low: Tensor, rows: Tensor, want_block: bool, want_rows: bool
) -> tuple[Tensor, Tensor]:
    """(d block, d rows) in fp32; what is not wanted is empty."""
    factor = low if low.numel() else block
    grad_low, times = lowered(grad, factor.dtype)
    empty = grad.new_empty(0)
    d_block = raised(product(grad_low, rows.to(factor.dtype).t()), times) if want_block else empty
    return d_block, raised(product(factor.t(), grad_low), times) if want_rows else empty.clone()


@decode_block_backward.register_fake
def _(
    grad: Tensor, block: Tensor, low: Tensor, rows: Tensor, want_block: bool, want_rows: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(block.shape if want_block else 0), grad.new_empty(rows.shape if want_rows else 0)


def _decode_block_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decode_block_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    block, low, rows = ctx.saved_tensors
    want_block, _, want_rows = ctx.needs_input_grad
    d_block, d_rows = decode_block_backward(grad, block, low, rows, want_block, want_rows)
    return d_block if want_block else None, None, d_rows.to(rows.dtype) if want_rows else None


select_block.register_autograd(_select_block_gradient, setup_context=_select_block_context)
decode_block.register_autograd(_decode_block_gradient, setup_context=_decode_block_context)
for _backward in (select_block_backward, decode_block_backward):
    _backward.register_autograd(no_second_derivative)
