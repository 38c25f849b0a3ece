"""Exact selection over many features without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache: maxima of blocks of 32 features tell which blocks hold an entry at or
above the running threshold tau, and only those blocks are looked at again. tau starts low and rises: whenever
the candidates number twice the budget they are cut to the exact best so far, whose last member is the new
tau. So the result is exact, whatever the first tau; one that was too high is seen by the count.

Where the operands have a screen, a chunk is a bfloat16 product (screen.py): what its bound does not rule out is a
candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import Entries
from ...support.nth_largest import nth_largest, nth_largest_of_rows
from ..encoder import Operands
from .products import (
    BLOCK_FEATURES,
    activations_at,
    candidate_spans,
    ends_of_tokens,
    features_of,
    sampled_product,
    token_blocks,
)
from .screen import UNIT, rounding_slack, screened_at

FIRST_CHUNK = 128
WIDEST_TABLE = 16
# a screen that lets more than this share of a chunk through costs more than it saves
MOST_SCREENED = 1 / 16


class Search:
    """Entries > 0 and at or above a floor, which may rise from chunk to chunk.

    With a screen every entry found is computed again, one by one, before it is compared with others: neither its value
    nor whether it is found depends on which chunks were screened.
    """

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.screening = operands.screen is not None and operands.screen.in_range
        self.found: list[Entries] = []
        self.settled: list[Entries] = []
        self.count = 0

    def look_at(self, token: int, block: Operands, span: slice, floor: Tensor) -> None:
        """Through some candidates of a block of tokens that begins at `token`; floor [1] or [B], of the block."""
        found = self._screened(token, block, span, floor)
        if found is None:
            a = activations_at(block, span)
            found = filter_chunk(a, token, span.start, least_in_full(block, span, floor))
        self.found.append(found)
        self.count += len(found.values)

    def _screened(self, token: int, block: Operands, span: slice, floor: Tensor) -> Entries | None:
        """What a look through the screen leaves; None where there is none, or it leaves too much."""
        if not self.screening or not floor.any():
            return None
        a, slack = screened_at(block, span)
        least = floor * (1 - UNIT) - slack
        if bool(least.isfinite().all()):
            candidates = filter_chunk(a, token, span.start, least)
            if len(candidates.values) <= MOST_SCREENED * a.numel():
                return candidates
        self.screening = False
        return None

    def settle(self, floor: Tensor) -> Entries:
        """All that was found, in full precision; floor [1] or [B], of the whole batch."""
        if self.operands.screen is None:
            self.settled += self.found
        elif self.found:
            seen = in_order(join(self.found), self.operands.n_candidates)
            values = self._activations(seen)
            least = floor if len(floor) == 1 else floor.index_select(0, seen.tokens)
            at = (values >= least.clamp_min(smallest_positive(values.dtype))).nonzero().squeeze(1)
            self.settled.append(take(Entries(values, seen.tokens, seen.features), at))
        return self.keep(join(self.settled))

    def keep(self, entries: Entries) -> Entries:
        """These alone of what was found so far."""
        self.found, self.settled, self.count = [], [entries], len(entries.values)
        return entries

    def _activations(self, entries: Entries) -> Tensor:
        """Before the relu, at entries sorted by token."""
        x, W, b, scale, members, *_ = self.operands
        features = entries.features if members is None else members.index_select(0, entries.features)
        z = sampled_product(x, W, ends_of_tokens(entries.tokens, len(x)), features)
        z += b.index_select(0, features)
        return z if scale is None else z.mul_(scale.index_select(0, features))


def stream_batch(operands: Operands, n: int, hint: float | None = None) -> Entries:
    """The n largest strictly positive entries of the batch, ties to the lower token, then feature.

    Args:
        hint: a guess of the n-th largest; a bad one costs time, never exactness.
    """
    found = search_batch(operands, n, hint)
    if len(found.values) < n and hint is not None:
        found = search_batch(operands, n)
    return sort_entries(found, operands.members)


def search_batch(operands: Operands, n: int, hint: float | None = None) -> Entries:
    """The n largest among those > 0 and >= hint; ties and order as `keep_best` has them, columns those of the pool."""
    floor, search = operands.x.new_full((1,), 0.0 if hint is None else hint), Search(operands)
    for token, block in token_blocks(operands):
        for span in candidate_spans(block, FIRST_CHUNK if hint is None else None):
            search.look_at(token, block, span, floor)
            if search.count >= 2 * n > 0:
                kept = search.keep(keep_best(search.settle(floor), n, operands.n_features))
                if search.count == n:
                    floor.fill_(kept.values.min())
    return keep_best(search.settle(floor), n, operands.n_features)


def stream_token(operands: Operands, k: int, hint: float | None = None) -> Entries:
    """The k largest strictly positive entries of each token, ties to the lower feature.

    Args:
        hint: a guess of the k-th largest over the token's norm; tokens for which it was too high are done again.
    """
    x, n_tokens = operands.x, operands.n_tokens
    floor = x.new_zeros(n_tokens) if hint is None else hint * torch.linalg.vector_norm(x, dim=1)
    blocks = []
    for token, block in token_blocks(operands):
        values, tokens, features = best_of_tokens(block, k, floor[token : token + block.n_tokens])
        blocks.append(Entries(values, tokens + token, features))
    best = join(blocks)
    if hint is not None:
        short = torch.bincount(best.tokens, minlength=n_tokens) < k
        again = short.nonzero().squeeze(1)
        if len(again):
            values, tokens, features = best_of_tokens(operands.of_tokens(again), k, x.new_zeros(len(again)))
            done = (~short[best.tokens]).nonzero().squeeze(1)
            best = join([take(best, done), Entries(values, again[tokens], features)])
    return sort_entries(best, operands.members)


def best_of_tokens(operands: Operands, k: int, floor: Tensor) -> Entries:
    """The k largest entries of each token among those > 0 and >= floor [B], in any order."""
    n_tokens, search = operands.n_tokens, Search(operands)
    for span in candidate_spans(operands, None if floor.any() else FIRST_CHUNK):
        search.look_at(0, operands, span, floor)
        if search.count >= 4 * k * n_tokens:
            best, floor = keep_best_of_tokens(search.settle(floor), k, n_tokens)
            search.keep(best)
    return keep_best_of_tokens(search.settle(floor), k, n_tokens)[0]


def batch_hint(entries: Entries, n: int) -> float | None:
    """`hint` for the next `stream_batch`: a little below this batch's smallest kept value.

    None where the budget n was not filled: there is no threshold to guess, and a guess would be run twice.
    """
    return 0.9 * float(entries.values.min()) if 0 < n == len(entries.values) else None


def token_hint(entries: Entries, x: Tensor, k: int) -> float | None:
    """`hint` for the next `stream_token`: a little below what all but 1/200 of the tokens x [B, d] need.

    Higher, and tokens have to be done again; lower, and there are more candidates to sort (both measured).
    None where more than 1/200 of the tokens have fewer than k entries: those would be done again every time.
    """
    values, tokens, _ = entries
    smallest = values.new_full((x.shape[0],), torch.inf).scatter_reduce_(0, tokens, values, "amin")
    full = torch.bincount(tokens, minlength=x.shape[0]) == k
    ratio = (smallest / torch.linalg.vector_norm(x, dim=1))[full]
    few = len(x) // 200
    return 0.95 * float(ratio.kthvalue(1 + few).values) if len(ratio) > max(few, len(x) - few - 1) else None


def least_in_full(operands: Operands, span: slice, floor: Tensor) -> Tensor:
    """The floor for a full product; with a screen, below what the product and one entry alone may differ by."""
    least = floor
    if operands.screen is not None and floor.any():
        least = floor - rounding_slack(operands, features_of(operands, span))
        least = torch.where(least.isfinite(), least, floor)
    return least.clamp_min(smallest_positive(floor.dtype))


def filter_chunk(a: Tensor, token: int, base: int, floor: Tensor) -> Entries:
    """Entries >= floor ([1] or [B]) of a chunk [B, C], sorted by token, then column.

    The chunk's first row is that of token `token`, its first column number `base`.
    """
    n_blocks = a.shape[1] // BLOCK_FEATURES
    top = a.view(-1, BLOCK_FEATURES).amax(1).view(-1, n_blocks)  # [B, C / 32]
    hits = (top >= floor[:, None]).flatten().nonzero().squeeze(1)
    inside = a.view(-1, BLOCK_FEATURES).index_select(0, hits)  # [H, 32]
    least = floor.index_select(0, hits // n_blocks) if len(floor) > 1 else floor
    at = (inside >= least[:, None]).flatten().nonzero().squeeze(1)
    place = hits.index_select(0, at // BLOCK_FEATURES) * BLOCK_FEATURES + at % BLOCK_FEATURES  # in the flat chunk
    return Entries(inside.flatten().index_select(0, at), place // a.shape[1] + token, place % a.shape[1] + base)


def smallest_positive(dtype: torch.dtype) -> float:
    return float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))


def keep_best(entries: Entries, n: int, n_features: int) -> Entries:
    """The n largest; ties to the lower token, then feature."""
    values, tokens, features = entries
    if len(values) <= n:
        return entries
    if n == 0:
        return Entries(values[:0], tokens[:0], features[:0])
    cut = nth_largest(values, n)
    mask = values > cut
    ties = (values == cut).nonzero().squeeze(1)
    missing = n - int(mask.sum())
    if len(ties) > missing:
        ties = ties[torch.argsort(tokens[ties] * n_features + features[ties])[:missing]]
    mask[ties] = True
    at = mask.nonzero().squeeze(1)
    return take(entries, at)


def keep_best_of_tokens(entries: Entries, k: int, n_tokens: int) -> tuple[Entries, Tensor]:
    """The k largest of each token, and the smallest of them [B] (0 where a token has fewer than k).

    A table [B, width] is fastest; where one token has far more entries than k it would be large, and a sort it is.
    """
    values, tokens, features = in_order(entries)
    counts = torch.bincount(tokens, minlength=n_tokens)
    first = counts.cumsum(0) - counts
    width = max(int(counts.max()), k)
    if width > WIDEST_TABLE * k:
        by_value = torch.argsort(values, descending=True, stable=True)
        by_value = by_value[torch.argsort(tokens[by_value], stable=True)]
        rank = torch.arange(len(tokens), device=tokens.device) - first[tokens]
        cut = values.new_zeros(n_tokens)
        last = by_value[rank == k - 1]
        cut[tokens[last]] = values[last]
        at = by_value[rank < k].sort().values
        return take(Entries(values, tokens, features), at), cut
    table = values.new_zeros(n_tokens, width)
    table[tokens, torch.arange(len(tokens), device=tokens.device) - first[tokens]] = values
    cut = nth_largest_of_rows(table, k)  # [B]
    least = cut.index_select(0, tokens)
    at = (values >= least).nonzero().squeeze(1)
    if len(at) == int(counts.clamp(max=k).sum()):
        return take(Entries(values, tokens, features), at), cut
    above = values > least
    tied = values == least
    rank = tied.cumsum(0)
    before = torch.cat((rank.new_zeros(1), rank))[first]
    room = k - torch.zeros_like(counts).index_add_(0, tokens, above.long())
    at = (above | (tied & (rank - before[tokens] <= room[tokens]))).nonzero().squeeze(1)
    return take(Entries(values, tokens, features), at), cut


def take(entries: Entries, at: Tensor) -> Entries:
    return Entries(*(column.index_select(0, at) for column in entries))


def join(parts: list[Entries]) -> Entries:
    return Entries(*(torch.cat(column) for column in zip(*parts)))


def in_order(entries: Entries, n_columns: int | None = None) -> Entries:
    """By token, then column."""
    tokens, features = entries.tokens, entries.features
    if n_columns is None:
        n_columns = int(features.max()) + 1 if len(features) else 1
    keys = tokens * n_columns + features
    if bool((keys[1:] > keys[:-1]).all()):
        return entries
    return take(entries, torch.argsort(keys))


def sort_entries(entries: Entries, members: Tensor | None) -> Entries:
    """By token, then feature; columns of the pool become features of the dictionary."""
    values, tokens, features = in_order(entries)
    return Entries(values, tokens, features if members is None else members[features])
