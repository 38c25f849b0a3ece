"""The steps of METHOD.md from the Triton operators: the same interface as torch_impl/layer.py.

A pool of up to BLOCK_FEATURES is computed as one block [B, P] with dense tensor-core products, a larger one and the
whole dictionary are streamed and handled entry by entry. Products take 16-bit operands where the inputs have 16
bits or autocast asks for it; sums, values and gradients are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import Selection, Slots, SparseCodes
from ...config import batch_budget
from ...kernels.segment_sum import feature_order
from ..pool_sampling import gumbel_keys
from ..row_gradients import RowSource
from ..torch.scores import finish_scores
from .block import decode_block, select_block
from .entries import decode_entries, entry_values, select_entries
from .ops import column_statistics, top_pool
from .stream import stream_above

BLOCK_FEATURES = 8192


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product's operands: x's own, or autocast's for fp32."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def centre(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """x - b_dec without a gradient, rounded once, to the dtype of the products."""
    centred = x.detach() if b_dec is None else x.detach().float() - b_dec.detach().float()
    return centred.to(product_dtype(x)).contiguous()


def weights_for(centred: Tensor, W: Tensor) -> Tensor:
    """W as an operand of products with `centred`: each feature's weights contiguous, no gradient."""
    return W.detach().to(centred.dtype).contiguous()


def vector(v: Tensor) -> Tensor:
    """Biases and scales: fp32, contiguous, no gradient."""
    return v.detach().float().contiguous()


def column_scores(x: Tensor, W: Tensor, b: Tensor, score: str, scale: Tensor | None) -> Tensor:
    """[F] of x [B, d], already centred."""
    x = centre(x, None)
    scale = None if scale is None else vector(scale)
    return finish_scores(column_statistics(x, weights_for(x, W), vector(b), score, scale), score)


def candidate_pool(scores: Tensor, size: int, how: str = "top", generator: torch.Generator | None = None) -> Tensor:
    """As `ranking.candidate_pool`, without a look at the device."""
    if how == "top":
        return top_pool(scores, size)
    order = torch.sort(gumbel_keys(scores, generator), descending=True, stable=True).indices
    return order[:size].sort().values


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
    hint: Tensor | None = None,
    rows: RowSource | None = None,
) -> Selection:
    """What x [B, d] keeps under W [F, d], b [F] inside the pool `members` [P], or everywhere for None.

    centred: `centre(x, b_dec)`. hint: that of the last batch under the same rule.
    """
    rows = rows if rows is not None else RowSource()
    scale = None if scale is None else vector(scale)
    per_token = select == "token"
    budget = int(k) if per_token else batch_budget(x.shape[0], k)
    if members is not None and len(members) <= BLOCK_FEATURES:
        return Selection(block_codes(x, b_dec, W, b, centred, scale, members, budget, per_token, rows), None)
    weights = weights_for(centred, W)
    values, tokens, features, hint = select_entries(
        centred, weights, vector(b), scale, members, budget, per_token, hint
    )
    slots = by_feature(values, tokens, features, members, x.shape[0], W.shape[0])
    slots = slots.with_values(attach(x, b_dec, W, b, centred, weights, scale, slots, rows))
    return Selection(SparseCodes.from_slots(slots, (x.shape[0], W.shape[0])), None if per_token else hint)


def block_codes(
    x: Tensor,
    b_dec: Tensor | None,
    W: Tensor,
    b: Tensor,
    centred: Tensor,
    scale: Tensor | None,
    members: Tensor,
    budget: int,
    per_token: bool,
    rows: RowSource,
) -> SparseCodes:
    """The kept entries of a small pool."""
    taken, b_taken = gather(rows, "W_enc", W, members), gather(rows, "b_enc", b, members)
    scale = None if scale is None else scale.index_select(0, members)
    block, low = select_block(x, b_dec, taken, b_taken, centred, scale, budget, per_token)
    return SparseCodes.from_block(block, members, W.shape[0], low)


def above_threshold(x: Tensor, b_dec: Tensor | None, W: Tensor, b: Tensor, threshold: Tensor) -> SparseCodes:
    """Every activation strictly above the threshold (0-dim), with its gradient; waits for the GPU to count them."""
    centred = centre(x, b_dec)
    weights = weights_for(centred, W)
    values, tokens, features = stream_above(centred, weights, vector(b), None, None, threshold)
    slots = by_feature(values, tokens.int(), features.int(), None, x.shape[0], W.shape[0])
    slots = slots.with_values(attach(x, b_dec, W, b, centred, weights, None, slots, RowSource()))
    return SparseCodes.from_slots(slots, (x.shape[0], W.shape[0]))


def by_feature(
    values: Tensor, tokens: Tensor, features: Tensor, members: Tensor | None, n_tokens: int, n_features: int
) -> Slots:
    """Entries sorted by token, and by feature for the backward pass."""
    every_token = torch.arange(n_tokens + 1, dtype=torch.int32, device=tokens.device)
    token_ends = torch.searchsorted(tokens, every_token, out_int32=True)
    rows = gradient_rows(features, members, n_features)
    order, row_ends = feature_order(features, rows)
    return Slots(values, tokens, features, token_ends, order, row_ends, rows)


def gradient_rows(features: Tensor, members: Tensor | None, n_features: int) -> Tensor:
    """Distinct features int64 [R], ascending, that include all in the list; R is known without looking.

    The candidates themselves, or where these outnumber the list's slots as many features as it has slots.
    """
    n_slots = len(features)
    if members is not None and len(members) <= n_slots:
        return members
    if n_features <= n_slots:
        return torch.arange(n_features, device=features.device)
    touched = torch.zeros(n_features + 1, device=features.device).index_fill_(0, features.long(), 1.0)
    return top_pool(touched[:-1], n_slots)


def attach(
    x: Tensor,
    b_dec: Tensor | None,
    W: Tensor,
    b: Tensor,
    centred: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    slots: Slots,
    rows: RowSource,
) -> Tensor:
    """The kept values with their gradient."""
    W_slot, b_slot = slot(rows, "W_enc", W, slots.rows), slot(rows, "b_enc", b, slots.rows)
    values, *where = slots
    return entry_values(x, b_dec, W_slot, b_slot, values, centred, weights, scale, *where)


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
    """[B, d] fp32: a dense product on a block, gathered rows on entries."""
    rows = rows if rows is not None else RowSource()
    dtype = product_dtype(W_dec)
    if codes.block is not None:
        assert codes.pool is not None
        block = codes.block.float()
        low = codes.low_block
        if low is None or (low.numel() == 0) != (dtype == torch.float32) or low.dtype != dtype:
            low = block.detach().to(dtype) if dtype != torch.float32 else block.new_empty(0)
        x_hat = decode_block(block, low, gather(rows, "W_dec", W_dec, codes.pool))
        return x_hat if b_dec is None else x_hat + b_dec.float()
    slots = codes.slots if codes.slots is not None else slots_of(codes)
    values, *where = slots
    W_slot = slot(rows, "W_dec", W_dec, slots.rows)
    b_dec = None if b_dec is None else b_dec.contiguous()
    return decode_entries(values, W_slot, b_dec, W_dec.detach().to(dtype).contiguous(), *where)


def slots_of(codes: SparseCodes) -> Slots:
    """Entries listed by someone else, sorted by token."""
    values, tokens, features = codes.entries()
    return by_feature(values.float(), tokens.int(), features.int(), None, *codes.shape)


def gather(rows: RowSource, name: str, W: Tensor, features: Tensor) -> Tensor:
    """W[features]; its gradient goes to W, or to `rows` where rows are wanted."""
    return rows.gather(name, W, features, W.dtype) if rows.keep else W.index_select(0, features)


def slot(rows: RowSource, name: str, W: Tensor, features: Tensor) -> Tensor:
    """Where an operator of entry_ops.py sends its gradient: W itself, or rows of it."""
    return rows.slot(name, W, features, W.dtype) if rows.keep else W
