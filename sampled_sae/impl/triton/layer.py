"""The steps of docs/method.md from the Triton operators: the same functions as torch/layer.py.

A pool of up to BLOCK_FEATURES is computed as one block [B, P] with dense tensor-core products, a larger one and the
whole dictionary are streamed and handled entry by entry. Products take 16-bit operands where the inputs have 16
bits or autocast asks for it; sums, values and gradients are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codes import Entries, SparseCodes
from ...kernels.batch_topk import compact_largest
from ..encoder import Encoder, Operands
from ..gate import Gate, floor_of, keep_above_, magnitudes
from ..hints import Rule, ThresholdHints
from ..row_gradients import RowSource
from ..torch.dense_above import DenseAbove
from . import block, entries, reconstruction, scores
from .block import BLOCK_FEATURES, block_codes
from .entries import narrow, padded_codes
from .screen import rounded_operands, tensors_of
from .stream import dense_from_list, dense_products, select_entries, stream_above


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product's operands: x's own, or autocast's for fp32."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def encoder(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
    rows: RowSource | None = None,
    screen: str = "off",
) -> Encoder:
    """What this step computes with: x - b_dec rounded once, and W, in the dtype of the products; biases in fp32."""
    dtype, x_alone = product_dtype(x), x.detach()
    if b_dec is None:
        centred = x_alone.to(dtype).contiguous()
    else:  # rounded as it is written, in one pass
        centred = torch.sub(x_alone, b_dec.detach(), out=x_alone.new_empty(x.shape, dtype=dtype))
    rows = rows if rows is not None else RowSource()
    # weights of fewer bits than the activations are raised chunk by chunk
    weights = rows.rounded.of("W_enc", W, dtype if W.dtype.itemsize >= dtype.itemsize else W.dtype)
    scales = None if scale is None else scale.detach().float().contiguous()
    bias = b.detach().float().contiguous()
    operands = Operands(centred, weights, bias, scales, screen=rounded_operands(centred, weights, screen))
    return Encoder(x, W, b, b_dec, scale, rows, operands)


def select(encoder: Encoder, members: Tensor | None, rule: Rule, hints: ThresholdHints | None = None) -> SparseCodes:
    """What a batch keeps inside the pool `members`, int64 [P], or everywhere for None."""
    if members is not None and len(members) <= BLOCK_FEATURES:
        return block_codes(encoder, members, rule)
    hints = hints if hints is not None else ThresholdHints()
    hint = hints.of(rule, members)
    found, hint = found_by(encoder.operands.among(members), rule, hint if isinstance(hint, Tensor) else None)
    if rule.select == "batch":
        hints.keep(rule, members, hint)
    return padded_codes(encoder, found, members)


def found_by(operands: Operands, rule: Rule, hint: Tensor | None) -> tuple[Entries, Tensor]:
    """The entries that a rule keeps, padded, and the next batch's hint."""
    x, W, b, scale, members, screen, *_ = operands
    by_token = rule.select == "token"
    budget = int(rule.k) if by_token else rule.budget(operands.n_tokens)
    *found, hint, opened = select_entries(x, W, b, scale, members, budget, by_token, hint, tensors_of(screen))
    if screen is not None:
        screen.looks.see_entries(operands.n_tokens * operands.n_candidates, opened)
    return Entries(*found), hint


def column_statistics(operands: Operands, score: str) -> Tensor:
    """[S, F] fp32, sums over the tokens: as those of torch/scores.py."""
    x, W, b, scale, *_ = operands
    if operands.n_tokens == 0:
        return x.new_zeros(scores.STATISTICS[score], W.shape[0], dtype=torch.float32)
    return scores.column_statistics(x, W, b, score, scale)


def use_block(pool: int, k: float, n_features: int) -> bool:
    """Whether a pool is handled as one block [B, P]."""
    return pool <= BLOCK_FEATURES


def search(operands: Operands, rule: Rule, hint: float | None) -> Entries:
    """As the torch form's, in a list of fixed length with padding at its end; tokens and features int32."""
    return found_by(operands, rule, None)[0]


def take_kept(found: Entries, kept: Tensor, n_tokens: int, n_features: int) -> Entries:
    """Those of `kept`, bool, among what `search` found; in as many places, so that nothing waits for their number."""
    values = torch.where(kept, found.values, 0)
    keys = found.tokens.long() * n_features + found.features.long()
    return Entries(*compact_largest(values, keys, len(values), n_tokens, n_features))


def encode_at(encoder: Encoder, entries: Entries) -> SparseCodes:
    """Activations at entries that the caller has chosen and computed, with their gradient.

    Args:
        entries: sorted by token; `values` are taken as they are.
    """
    return padded_codes(encoder, narrow(entries), None)


def above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> SparseCodes:
    """Every activation strictly above the threshold, 0-dim or [F], with its gradient; waits for the GPU to count them.

    With a gate those alone that it lets through; the encoder has no scale then, and a bias of 0. Products of 16 bits
    may be summed in another order here than in `dense_above_threshold` (stream.py, `in_tiles`): values differ by what
    rounding in fp32 may do, and so may which of the activations are there that lie so close to the threshold.
    """
    operands, floors = encoder.operands, None
    if threshold.dim() or gate is not None:
        floors = floor_of(threshold, gate, torch.float32).expand(operands.n_features).contiguous()
    found = stream_above(operands, threshold if threshold.dim() == 0 else 0.0, floors)
    if gate is not None:
        found = magnitudes(found, threshold, gate)
        encoder = encoder._replace(operands=operands._replace(scale=gate.gain.detach().float().contiguous()))
    return padded_codes(encoder, narrow(found), None)


def dense_above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> Tensor:
    """`above_threshold` as a dense fp32 matrix [B, F], but for its rounding of 16-bit products; its gradient reaches x
    alone; waits for nothing."""
    return DenseAbove.apply(encoder.x, encoder.operands, threshold, gate, fill_above)


def fill_above(operands: Operands, threshold: Tensor, gate: Gate | None) -> Tensor:
    """Through a screen, but for a gate."""
    if operands.screen is not None and gate is None and operands.n_tokens:
        floors = floor_of(threshold, None, torch.float32).expand(operands.n_features).contiguous()
        return dense_from_list(operands, floors)
    return keep_above_(dense_products(operands), threshold, gate)


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
    """[B, d] fp32: a dense product on a block, gathered rows on entries."""
    rows = rows if rows is not None else RowSource()
    dtype = product_dtype(W_dec)
    if codes.block is None:
        return entries.decode_codes(codes, W_dec, b_dec, rows, dtype)
    x_hat = block.decode_codes(codes, W_dec, rows, dtype)
    return x_hat if b_dec is None else x_hat + b_dec.float()


def squared_errors(raw: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """(raw + bias, its squared error for each token): fp32 [B, d] and [B]."""
    return reconstruction.squared_errors(raw, bias, target, product_dtype(target) == torch.bfloat16)


def decode_levels(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int], rows: RowSource | None = None
) -> Tensor:
    """[B, G, d] fp32, as the torch form's: the entries of a list are decoded once, a block once a level."""
    rows = rows if rows is not None else RowSource()
    dtype, shape = product_dtype(W_dec), (codes.shape[0], len(groups), W_dec.shape[1])
    if codes.block is None:
        apart = entries.of_levels(codes, groups)
        levels = entries.decode_codes(apart, W_dec, None, rows, dtype).view(shape).cumsum(1)
    else:
        levels = block.decode_codes(block.of_levels(codes, groups), W_dec, rows, dtype).view(shape)
    return levels if b_dec is None else levels + b_dec.float()
