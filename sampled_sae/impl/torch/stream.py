"""Exact selection over many features without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache: maxima of blocks of 32 features tell which blocks hold an entry at or
above the running threshold tau, and only those blocks are looked at again. tau starts low and rises: whenever
the candidates number twice the budget, or four times with a screen, they are cut to the exact best so far, whose last
member is the new tau. So the result is exact, whatever the first tau; one that was too high is seen by the count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import Entries
from ...support.nth_largest import nth_largest, nth_largest_of_rows
from ..encoder import Operands
from .products import candidate_spans, token_blocks
from .search import MOST_KEPT, Search, in_order, merged

FIRST_CHUNK = 128
WIDEST_TABLE = 16


class BatchSearch(Search):
    """For the n largest of all."""

    def __init__(self, operands: Operands, n: int) -> None:
        super().__init__(operands)
        self.n = n

    def _arranged(self) -> Entries:
        return Entries.joined(self.found)

    def _least(self, entries: Entries, at: Entries, share: float) -> Tensor:
        n = round(share * self.n)
        return nth_largest(entries.values, n) if 0 < n <= len(entries.values) else entries.values.new_zeros(1)


class TokenSearch(Search):
    """For the k largest of each token."""

    def __init__(self, operands: Operands, k: int) -> None:
        super().__init__(operands)
        self.k = k

    def _arranged(self) -> Entries:
        return merged(self.found, self.operands.n_tokens)

    def _least(self, entries: Entries, at: Entries, share: float) -> Tensor:
        values, tokens, _ = entries
        k = round(share * self.k)
        table = by_token(values, tokens, torch.bincount(tokens, minlength=self.operands.n_tokens), k)
        # a token that has so many is not in the usual case
        return values.new_zeros(1) if table is None else nth_largest_of_rows(table, k).index_select(0, at.tokens)


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
    floor = operands.x.new_full((1,), 0.0 if hint is None else hint)
    operands = operands.screened_for(n, MOST_KEPT)
    search = BatchSearch(operands, n)
    # what a screen finds costs little until it is computed
    most = 2 if operands.screen is None else 4
    for at, block in token_blocks(operands):
        for span in candidate_spans(block, FIRST_CHUNK if hint is None else None):
            search.look_at(at.start, block, span, floor)
            if search.count >= most * n > 0:
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
    for at, block in token_blocks(operands):
        values, tokens, features = best_of_tokens(block, k, floor[at])
        blocks.append(Entries(values, tokens + at.start, features))
    best = Entries.joined(blocks)
    if hint is not None:
        short = torch.bincount(best.tokens, minlength=n_tokens) < k
        again = short.nonzero().squeeze(1)
        if len(again):
            values, tokens, features = best_of_tokens(operands.of_tokens(again), k, x.new_zeros(len(again)))
            done = (~short[best.tokens]).nonzero().squeeze(1)
            best = Entries.joined([best.at(done), Entries(values, again[tokens], features)])
    return sort_entries(best, operands.members)


def best_of_tokens(operands: Operands, k: int, floor: Tensor) -> Entries:
    """The k largest entries of each token among those > 0 and >= floor [B], in any order."""
    n_tokens = operands.n_tokens
    operands = operands.screened_for(k * n_tokens, MOST_KEPT)
    search = TokenSearch(operands, k)
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
    return entries.at(at)


def keep_best_of_tokens(entries: Entries, k: int, n_tokens: int) -> tuple[Entries, Tensor]:
    """The k largest of each token, and the smallest of them [B] (0 where a token has fewer than k).

    A table [B, width] is fastest; where one token has far more entries than k it would be large, and a sort it is.
    """
    entries = in_order(entries)
    values, tokens, _ = entries
    counts = torch.bincount(tokens, minlength=n_tokens)
    first = counts.cumsum(0) - counts
    table = by_token(values, tokens, counts, k)
    if table is None:
        by_value = torch.argsort(values, descending=True, stable=True)
        by_value = by_value[torch.argsort(tokens[by_value], stable=True)]
        rank = torch.arange(len(tokens), device=tokens.device) - first[tokens]
        cut = values.new_zeros(n_tokens)
        last = by_value[rank == k - 1]
        cut[tokens[last]] = values[last]
        at = by_value[rank < k].sort().values
        return entries.at(at), cut
    cut = nth_largest_of_rows(table, k)  # [B]
    least = cut.index_select(0, tokens)
    at = (values >= least).nonzero().squeeze(1)
    if len(at) == int(counts.clamp(max=k).sum()):
        return entries.at(at), cut
    above = values > least
    tied = values == least
    rank = tied.cumsum(0)
    before = torch.cat((rank.new_zeros(1), rank))[first]
    room = k - torch.zeros_like(counts).index_add_(0, tokens, above.long())
    at = (above | (tied & (rank - before[tokens] <= room[tokens]))).nonzero().squeeze(1)
    return entries.at(at), cut


def by_token(values: Tensor, tokens: Tensor, counts: Tensor, k: int) -> Tensor | None:
    """Values sorted by token, of which each has `counts` [B], as a table [B, k or more] with 0 in free places.

    None where it would be large, since one token has far more of them than k.
    """
    width = max(int(counts.max()), k)
    if width > WIDEST_TABLE * k:
        return None
    first = counts.cumsum(0) - counts
    table = values.new_zeros(len(counts), width)
    table[tokens, torch.arange(len(tokens), device=tokens.device) - first[tokens]] = values
    return table


def sort_entries(entries: Entries, members: Tensor | None) -> Entries:
    """By token, then feature; columns of the pool become features of the dictionary."""
    values, tokens, features = in_order(entries)
    return Entries(values, tokens, features if members is None else members[features])
