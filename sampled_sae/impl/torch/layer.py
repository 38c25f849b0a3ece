"""The steps of docs/method.md in PyTorch: the functions of reference.py with the loops turned inside out.

A small pool is computed as one block [B, P] with dense products; a large one is streamed and handled entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codes import Entries, SparseCodes
from ...support.argument_checks import HALF
from ..encoder import Encoder, LateTokens, Operands
from ..gate import Gate, floor_of, magnitudes
from ..hints import Rule, ThresholdHints
from ..row_gradients import RowSource
from .above import entries_above
from .block import block_codes, use_block
from .dense_above import DenseAbove, fill_above
from .entries import decode_entries, entry_codes
from .levels import decode_block_levels, decode_entry_levels
from .products import without_autocast
from .screen import rounded
from .stream import (
    batch_hint,
    search_batch,
    sort_entries,
    stream_batch,
    stream_token,
    token_hint,
)


def encoder(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
    rows: RowSource | None = None,
    screen: str = "auto",
    late: LateTokens | None = None,
) -> Encoder:
    """What this step computes with: float32 for 16-bit inputs, W in its own dtype until a chunk of it is needed.

    late: for a search above thresholds alone, which then takes x as it is and prepares the tokens that it needs.
    """
    dtype, prepare = (torch.float32 if x.dtype in HALF else x.dtype, None) if late is None else late
    given = x.detach()
    if late is None:
        given = given.to(dtype) if b_dec is None else given.to(dtype) - b_dec.detach().to(dtype)
    scales = None if scale is None else scale.detach().to(dtype)
    seen = rounded(given, W, screen, dtype, prepare)
    operands = Operands(given, W.detach(), b.detach().to(dtype), scales, screen=seen, prepare=prepare)
    return Encoder(x, W, b, b_dec, scale, rows if rows is not None else RowSource(), operands)


@without_autocast
def select(encoder: Encoder, members: Tensor | None, rule: Rule, hints: ThresholdHints | None = None) -> SparseCodes:
    """What a batch keeps inside the pool `members`, int64 [P], or everywhere for None."""
    if members is not None and use_block(len(members), rule.k, encoder.operands.n_features):
        return block_codes(encoder, members, rule)
    hints = hints if hints is not None else ThresholdHints()
    candidates, hint = encoder.operands.among(members), hints.of(rule, members)
    if candidates.n_tokens == 0:
        return entry_codes(encoder, Entries.none(candidates.x))
    hint = None if isinstance(hint, Tensor) else hint
    if rule.select == "batch":
        budget = rule.budget(candidates.n_tokens)
        found = stream_batch(candidates, budget, hint)
        hints.keep(rule, members, batch_hint(found, budget))
    else:
        found = stream_token(candidates, int(rule.k), hint)
        hints.keep(rule, members, token_hint(found, candidates.x, int(rule.k)))
    return entry_codes(encoder, found)


@without_autocast
def search(operands: Operands, rule: Rule, hint: float | None) -> Entries:
    """Entries of some tokens that can be among those kept of more, sorted by token, then feature; no gradient.

    Args:
        operands: with the candidates as its members.
        rule: by batch, the `rule.most` largest at or above `hint`, with None of all; by token, the k largest of each.
    """
    if operands.n_tokens == 0 or operands.n_candidates == 0:
        return Entries.none(operands.x)
    if rule.select == "token":
        return stream_token(operands, min(int(rule.k), operands.n_candidates))
    found = search_batch(operands, rule.budget(operands.n_tokens), hint)
    return sort_entries(found, operands.members)


def take_kept(found: Entries, kept: Tensor, n_tokens: int, n_features: int) -> Entries:
    """Those of `kept`, bool, among what `search` found."""
    return found.at(kept.nonzero().squeeze(1))


@without_autocast
def encode_at(encoder: Encoder, entries: Entries) -> SparseCodes:
    """Activations at entries that the caller has chosen and computed, with their gradient.

    Args:
        entries: sorted by token; `values` are taken as they are.
    """
    return entry_codes(encoder, entries)


@without_autocast
def above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> SparseCodes:
    """Every activation strictly above the threshold, 0-dim or [F], with its gradient.

    With a gate those alone that it lets through; the encoder has no scale then, and a bias of 0.
    """
    operands = encoder.operands
    found = entries_above(operands, floor_of(threshold, gate, operands.b.dtype))
    if gate is not None:
        found = magnitudes(found, threshold, gate)
        encoder = encoder._replace(operands=operands._replace(scale=gate.gain.detach()))
    return entry_codes(encoder, found)


@without_autocast
def dense_above_threshold(encoder: Encoder, threshold: Tensor, gate: Gate | None = None) -> Tensor:
    """`above_threshold` as a dense matrix [B, F], whose gradient reaches x alone."""
    return DenseAbove.apply(encoder.x, encoder.operands, threshold, gate, fill_above)


@without_autocast
def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, rows: RowSource | None = None) -> Tensor:
    """[B, d] in the codes' dtype: a dense product on a block, gathered rows on entries."""
    rows = rows if rows is not None else RowSource()
    if codes.block is not None:
        assert codes.pool is not None
        x_hat = codes.block @ rows.gather("W_dec", W_dec, codes.pool, codes.block.dtype)
    else:
        x_hat = decode_entries(codes, W_dec, rows)
    return x_hat if b_dec is None else x_hat + b_dec.to(x_hat.dtype)


@without_autocast
def decode_levels(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, groups: Sequence[int], rows: RowSource | None = None
) -> Tensor:
    """[B, G, d] in the codes' dtype: the reconstructions by the first g features, for each g of `groups`, ascending.

    Each entry is decoded once, for the smallest level that has its feature; the others add it up.
    """
    rows = rows if rows is not None else RowSource()
    decode_each = decode_entry_levels if codes.block is None else decode_block_levels
    return decode_each(codes, W_dec, b_dec, groups, rows)
