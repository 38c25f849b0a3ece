"""Exact selection over many features without [B, F] and without a look at the device.

Chunks of the encoder product pass a filter by a guessed threshold tau, whose hits go to a list with room for
CAPACITY times the budget. A tau that lets too many or too few through is seen by their count, on the device, and
the selection is then done again exactly (kernels/exact_fallback.py): the guess costs time, never exactness. Lists
are ordered by key, token * F + feature, before anything depends on their order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.batch_topk import compact_largest
from ...kernels.chunk_filter import append_above_, first_threshold, next_threshold
from ...kernels.exact_fallback import refill_exactly_
from ...kernels.token_topk import merge_rows_
from .products import encoder_chunks

CAPACITY = 2
# room for the error of a threshold that comes from few entries
SLACK = 4096
# of the budget, what a first threshold is to let through
MARGIN = 1.4
SAMPLE_ELEMENTS = 1 << 23
SAMPLE_STEP = 16
FEWEST_TOKENS = 64
# of a threshold chosen by the caller: guessed entries a token
ABOVE_PER_TOKEN = 128

Entries = tuple[Tensor, Tensor, Tensor]


def stream_batch(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    members: Tensor | None,
    n: int,
    hint: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The n largest strictly positive entries of the batch, ties to the lower token, then feature.

    Args:
        x, W, b, scale: [B, d], [F, d], [F] or None, [F] or None.
        members: int64 [P] ascending, the features to look at; None for all.
        hint: fp32 [1], what the last batch returned.

    Returns:
        values fp32, tokens int32 and features int32, each [n], sorted by token, then feature; unused slots at the
        end hold 0, B and F. The next batch's hint, fp32 [1]; 0 where the budget was not filled.
    """
    size = x.shape[0] * (W.shape[0] if members is None else len(members))
    if n == 0 or size == 0:
        nothing = x.new_zeros(0, dtype=torch.float32)
        kept = compact_largest(nothing, nothing.long(), n, x.shape[0], W.shape[0])
        return *kept, x.new_zeros(1, dtype=torch.float32)
    cap = min(CAPACITY * n + SLACK, size)
    if cap == size:
        tau = x.new_zeros(1, dtype=torch.float32)
    else:
        tau = sampled_threshold(x, W, b, scale, members, n) if hint is None else hint
    values, keys, count = entries_above(x, W, b, scale, members, tau, cap)
    if cap < size:
        refill_exactly_(x, W, b, scale, members, n, tau, values, keys, count)
    values, keys = in_order(values, keys, x.shape[0] * W.shape[0])
    kept = compact_largest(values, keys, n, x.shape[0], W.shape[0])
    return *kept, next_threshold(kept[0].amin(), tau, count, n)


def stream_token(
    x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None, members: Tensor | None, k: int
) -> Entries:
    """The k largest strictly positive entries of each token, ties to the lower feature; [B * k], as `stream_batch`."""
    n_tokens, n_features = x.shape[0], W.shape[0]
    values = x.new_zeros(n_tokens, k, dtype=torch.float32)
    features = torch.full((n_tokens, k), 2**31 - 1, dtype=torch.int32, device=x.device)
    for chunk in encoder_chunks(x, W, b, scale, members):
        merge_rows_(values, features, chunk.z, chunk.features, chunk.b, chunk.scale)
    tokens = torch.arange(n_tokens, device=x.device)
    keys = tokens[:, None] * n_features + features
    return compact_largest(values.flatten(), keys.flatten(), n_tokens * k, n_tokens, n_features)


def stream_above(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    members: Tensor | None,
    tau: Tensor | float,
) -> Entries:
    """Every entry > 0 and > tau: values fp32, tokens and features int64, sorted by token, then feature.

    Waits for the device to count them, and runs again where there are more than was guessed.
    """
    size = x.shape[0] * (W.shape[0] if members is None else len(members))
    least = torch.as_tensor(tau, dtype=torch.float32, device=x.device).reshape(1)
    least = torch.nextafter(least, torch.full_like(least, torch.inf))
    cap = min(ABOVE_PER_TOKEN * x.shape[0], size)
    values, keys, count = entries_above(x, W, b, scale, members, least, cap)
    found = int(count)
    if found > cap:
        values, keys, _ = entries_above(x, W, b, scale, members, least, found)
    values, keys = in_order(values[:found], keys[:found], x.shape[0] * W.shape[0])
    tokens = keys // max(W.shape[0], 1)
    return values, tokens, keys - tokens * W.shape[0]


def entries_above(
    x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None, members: Tensor | None, tau: Tensor, cap: int
) -> Entries:
    """Entries > 0 and >= tau in any order: values fp32 [cap], keys int64 [cap], their number int64 [1].

    Unused slots hold value 0 and key B * F; a number above cap says that some are missing.
    """
    values = x.new_zeros(cap, dtype=torch.float32)
    keys = torch.full((cap,), x.shape[0] * W.shape[0], dtype=torch.int64, device=x.device)
    count = x.new_zeros(1, dtype=torch.int64)
    for chunk in encoder_chunks(x, W, b, scale, members):
        append_above_(chunk.z, chunk.b, chunk.scale, chunk.features, W.shape[0], tau, values, keys, count)
    return values, keys, count


def sampled_threshold(
    x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None, members: Tensor | None, n: int
) -> Tensor:
    """A threshold that about MARGIN * n entries of the batch reach, judged by every s-th token: fp32 [1]."""
    n_tokens, size = x.shape[0], W.shape[0] if members is None else len(members)
    step = max(1, min(SAMPLE_STEP, n_tokens // FEWEST_TOKENS), n_tokens * size // SAMPLE_ELEMENTS)
    some = x[::step]
    rank = MARGIN * n * len(some) / n_tokens
    if step > 1:
        # three standard deviations of a rank this low
        rank += 3 * math.sqrt(rank)
    if rank >= len(some) * size:
        return x.new_zeros(1, dtype=torch.float32)
    z = torch.empty(len(some), size, dtype=torch.float32, device=x.device)
    for chunk in encoder_chunks(some, W, None, None, members):
        z[:, chunk.at] = chunk.z
    if members is not None:
        b, scale = (None if t is None else t.index_select(0, members) for t in (b, scale))
    return first_threshold(z, b, scale, max(1, round(rank)))


def in_order(values: Tensor, keys: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Sorted by key, all of which are at most `last`: 32 bits, where they suffice, take half the passes."""
    keys, order = torch.sort(keys.int() if last < 2**31 else keys)
    return values.index_select(0, order), keys.long()
