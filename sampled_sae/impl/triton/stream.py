"""Exact selection over many features without [B, F] and without a host synchronisation.

The encoder product passes a filter by a guessed threshold tau, whose hits go to a list with room for CAPACITY times the
budget; behind a screen for more, since that lets through what it cannot tell. A tau that lets too many or too few
through is seen by their count, on the device, and the selection is then done again exactly (kernels/exact_fallback.py):
the guess costs time, never exactness. Product and filter are one kernel for operands of 16 bits up to some d, whose
tiles the repair multiplies too: it finds the same bits. Otherwise chunks of cuBLAS's product are filtered, and what is
found again comes from another product, in IEEE whatever TF32's switch says: values differ in their last bits, or by
TF32's rounding, and so may what is kept of the entries that lie so close to the cut. Lists are ordered by key,
token * F + feature, before anything depends on their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codes import Entries
from ...kernels.batch_topk import compact_largest
from ...kernels.chunk_filter import append_above_, first_threshold, next_threshold
from ...kernels.configs import architecture, largest_fused_d
from ...kernels.exact_fallback import refill_exactly_
from ...kernels.merge_rows import merge_rows_
from ...kernels.product_filter import append_products_above_
from ..encoder import Operands
from .products import encoder_chunks
from .screen import of_tensors
from .screen_entries import (
    Hits,
    best_of_tokens,
    dense_above,
    hits_reaching,
    in_order,
    no_best,
    no_hits,
    room_for_tokens,
    rounded_of,
)

CAPACITY = 2
# The same behind a screen, which leaves about 1.9 budgets of candidates open at d = 768, and 3.3 at d = 4096. A list
# that overflows costs several products in full, in every step; room costs a little memory.
SCREENED_CAPACITY = 6
# of the candidates, how many may be kept; beyond it, entries computed one by one cost more than a product of all
MOST_SCREENED = 1 / 50
# room for the error of a threshold that comes from few entries
SLACK = 4096
# of the budget, what a first threshold is to let through
MARGIN = 1.4
SAMPLE_ELEMENTS = 1 << 23
SAMPLE_STEP = 16
FEWEST_TOKENS = 64
# of a threshold chosen by the caller: guessed entries a token
ABOVE_PER_TOKEN = 128
# of a dense result through a screen: entries for each place in its list, where that gives more places
ENTRIES_A_PLACE = 64
# a threshold that lets more than this share through gets whole rows, of so many activations at once
MOST_LISTED = 1 / 16
ROW_ELEMENTS = 1 << 26


def stream_batch(operands: Operands, n: int, hint: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The n largest strictly positive entries of the batch, ties to the lower token, then feature.

    Args:
        hint: fp32 [1], what the last batch returned.

    Returns:
        values fp32, tokens int32 and features int32, each [n], sorted by token, then feature; padding at the
        end holds 0, B and F. The next batch's hint, fp32 [1]; 0 where the budget was not filled.
    """
    operands = worth_a_screen(operands, n)
    x, W, b, scale, members, *_ = operands
    shape = operands.n_tokens, operands.n_features
    size = operands.n_tokens * operands.n_candidates
    if n == 0 or size == 0:
        nothing = x.new_zeros(0, dtype=torch.float32)
        return *compact_largest(nothing, nothing.long(), n, *shape), x.new_zeros(1, dtype=torch.float32)
    capacity = CAPACITY if operands.screen is None else SCREENED_CAPACITY
    cap = min(capacity * n + SLACK, size)
    if cap == size:
        tau = x.new_zeros(1, dtype=torch.float32)
    else:
        tau = sampled_threshold(operands, n) if hint is None else hint
    hits = hits_above(operands, tau, cap)
    if cap < size:
        refill_exactly_(x, W, b, scale, members, n, tau, *hits)
    kept = compact_largest(*in_order(hits.values, hits.keys, shape), n, *shape)
    return *kept, next_threshold(kept[0].amin(), tau, hits.found, n)


def stream_token(operands: Operands, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest strictly positive entries of each token, ties to the lower feature; [B * k], as `stream_batch`."""
    n_tokens, n_features = operands.n_tokens, operands.n_features
    operands = worth_a_screen(operands, n_tokens * k)
    if operands.screen is not None:
        cap = room_for_tokens(operands, k) + SLACK
        if 0 < cap < n_tokens * operands.n_candidates:
            return compact_largest(*best_of_tokens(operands, k, cap), n_tokens * k, n_tokens, n_features)
        all_open(operands)
    values, features = no_best(operands, k)
    for chunk in encoder_chunks(operands):
        merge_rows_(values, features, chunk.z, chunk.features, chunk.b, chunk.scale)
    tokens = torch.arange(n_tokens, device=values.device)
    keys = tokens[:, None] * n_features + features
    return compact_largest(values.flatten(), keys.flatten(), n_tokens * k, n_tokens, n_features)


def stream_above(operands: Operands, tau: Tensor | float, floors: Tensor | None = None) -> Entries:
    """Every entry > 0 and > tau: values fp32, tokens and features int64, sorted by token, then feature.

    With `floors` fp32 [F] every entry of (x W^T + b) * scale > floors, whatever tau is. Waits for the device to count
    them, and runs again where there are more than was guessed: for a list of them, or where that would be large for
    whole rows of activations, a few tokens at a time.
    """
    n_tokens, n_features = operands.n_tokens, operands.n_features
    if n_tokens == 0:  # of a process whose part of a batch is empty
        nothing = operands.x.new_zeros(0, dtype=torch.float32)
        return Entries(nothing, nothing.long(), nothing.long())
    least = torch.as_tensor(tau, dtype=torch.float32, device=operands.x.device).reshape(1)
    least = torch.nextafter(least, torch.full_like(least, torch.inf))
    cap = min(ABOVE_PER_TOKEN * n_tokens, n_tokens * operands.n_candidates)
    hits = hits_above(operands, least, cap, floors)
    found = int(hits.found)
    if found > max(cap, MOST_LISTED * n_tokens * n_features) and operands.members is None:
        return in_whole_rows(operands, least, floors)
    if found > cap:
        hits = hits_above(operands, least, found, floors)
        found = int(hits.found)
    # a screen leaves unused places between the others
    listed = found if operands.screen is None else len(hits.keys)
    values, keys = in_order(hits.values[:listed], hits.keys[:listed], (n_tokens, n_features))
    values, keys = values[:found], keys[:found]
    tokens = keys // max(n_features, 1)
    return Entries(values, tokens, keys - tokens * n_features)


def in_whole_rows(operands: Operands, least: Tensor, floors: Tensor | None) -> Entries:
    """Entries > 0 and >= least, or > floors, of dense rows of activations."""
    step, parts = max(1, ROW_ELEMENTS // operands.n_features), []
    for start in range(0, operands.n_tokens, step):
        part = operands.of_tokens(slice(start, start + step))
        z = dense_products(part)
        tokens, features = ((z > 0) & (z >= least) if floors is None else z > floors).nonzero(as_tuple=True)
        parts.append(Entries(z[tokens, features], tokens + start, features))
    return Entries.joined(parts)


def dense_from_list(operands: Operands, floors: Tensor) -> Tensor:
    """(x W^T + b) * scale where that is > floors fp32 [F] >= 0, and 0 elsewhere, through a screen: fp32 [B, F].

    In full where the list has no room for what the screen leaves open; waits for nothing.
    """
    a_token = max(ABOVE_PER_TOKEN, operands.n_features // ENTRIES_A_PLACE)
    return dense_above(operands, floors, a_token * operands.n_tokens)


def dense_products(operands: Operands) -> Tensor:
    """(x W^T + b) * scale, fp32 [B, F], chunk by chunk."""
    out = operands.x.new_empty(operands.n_tokens, operands.n_features, dtype=torch.float32)
    for chunk in encoder_chunks(operands):
        z = torch.add(chunk.z, chunk.b, out=out[:, chunk.at])
        if chunk.scale is not None:
            z.mul_(chunk.scale)
    return out


def hits_above(operands: Operands, tau: Tensor, cap: int, floors: Tensor | None = None) -> Hits:
    """Entries > 0 and >= tau; with floors [F] those of (x W^T + b) * scale > floors.

    Through a screen, where there is not room for all entries anyway: more candidates than `cap` count as so many found.
    """
    n_features = operands.n_features
    if operands.screen is not None and cap < operands.n_tokens * operands.n_candidates:
        by_feature = floors is not None
        return hits_reaching(operands, tau.repeat(operands.n_tokens) if floors is None else floors, cap, by_feature)
    all_open(operands)
    hits = no_hits(operands, cap)
    if in_tiles(operands):
        x, W, b, scale, members, *_ = operands
        append_products_above_(x, W, b, scale, members, tau, *hits, floors)
        return hits
    for chunk in encoder_chunks(operands):
        some = None if floors is None else floors[chunk.at if operands.members is None else chunk.features]
        append_above_(chunk.z, chunk.b, chunk.scale, chunk.features, n_features, tau, *hits, some)
    return hits


def in_tiles(operands: Operands) -> bool:
    """Whether product and filter are one kernel, which saves writing and reading [B, F] and multiplies slower than
    cuBLAS."""
    x, W = operands.x, operands.W
    same = x.dtype == W.dtype and x.dtype.itemsize == 2
    return same and x.shape[1] <= largest_fused_d(architecture(x.device), x.dtype)


def worth_a_screen(operands: Operands, n_kept: int) -> Operands:
    """Without a screen, and all of it noted as open, where too much is kept for one."""
    some = operands.screened_for(n_kept, MOST_SCREENED)
    if some.screen is None:
        all_open(operands)
    return some


def all_open(operands: Operands) -> None:
    """Notes that what a screen could have ruled out is computed all the same: there is room for every entry."""
    if operands.screen is not None:
        size = operands.n_tokens * operands.n_candidates
        operands.screen.looks.see_entries(size, size)


def sampled_threshold(operands: Operands, n: int) -> Tensor:
    """A threshold that about MARGIN * n entries of the batch reach, judged by every s-th token: fp32 [1]."""
    x, W, b, scale, members, *_ = operands
    if operands.screen is not None:  # a guess
        x, W = rounded_of(operands).tokens.values, rounded_of(operands).weights.values
    n_tokens, size = operands.n_tokens, operands.n_candidates
    step = max(1, min(SAMPLE_STEP, n_tokens // FEWEST_TOKENS), n_tokens * size // SAMPLE_ELEMENTS)
    some = x[::step]
    rank = MARGIN * n * len(some) / n_tokens
    if step > 1:
        # three standard deviations of a rank this low
        rank += 3 * math.sqrt(rank)
    if rank >= len(some) * size:
        return x.new_zeros(1, dtype=torch.float32)
    z = torch.empty(len(some), size, dtype=torch.float32, device=x.device)
    for chunk in encoder_chunks(Operands(some, W, b, None, members)):
        z[:, chunk.at] = chunk.z
    if members is not None:
        b, scale = b.index_select(0, members), None if scale is None else scale.index_select(0, members)
    return first_threshold(z, b, scale, max(1, round(rank)))


@torch.library.custom_op("sampled_sae::select_entries", mutates_args=())
def select_entries(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    scale: Tensor | None,
    members: Tensor | None,
    budget: int,
    per_token: bool,
    hint: Tensor | None,
    screen: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kept entries of relu(x W^T + b) * scale: (values, tokens, features, the next batch's hint fp32 [1], opened).

    `budget` entries of the batch, or of each token; sorted by token, then feature. screen: `tensors_of` one, or none;
    opened, int64 [1], is how many entries it left open.
    """
    operands = Operands(x, W, b, scale, members, of_tensors(x, screen))
    if per_token:
        found = (*stream_token(operands, budget), x.new_zeros(1, dtype=torch.float32))
    else:
        found = stream_batch(operands, budget, hint)
    opened = 0 if operands.screen is None else operands.screen.looks.open_entries
    return (*found, opened if isinstance(opened, Tensor) else x.new_full((1,), opened, dtype=torch.int64))


@select_entries.register_fake
def _(x: Tensor, W: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    budget, per_token = rest[-4:-2]
    n = x.shape[0] * budget if per_token else budget
    values = x.new_empty(n, dtype=torch.float32)
    tokens, features = (x.new_empty(n, dtype=torch.int32) for _ in range(2))
    return values, tokens, features, x.new_empty(1, dtype=torch.float32), x.new_empty(1, dtype=torch.int64)
