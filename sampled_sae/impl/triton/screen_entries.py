"""Which entries may reach a floor, seen through bfloat16 products, and their activations in full precision.

docs/method.md, "Screening": with z^ the bfloat16 product in fp32 and s_ij how far it may be off, no activation lies
above (z^ + s + b) * scale or below (z^ - s + b) * scale. What the first rules out is never computed. A value that is
not a number rules out nothing, so that operands out of range end in the full search, not in another result.

For the k best of each token one walk over the chunks takes both looks: what a chunk's activations are at least raises
what the k-th best of its token is at least, and what may reach that is listed. Nothing is guessed, and none can be
missing. Where the list has no room for all of them, the search without a screen is done, decided on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.arguments import Spread
from ...kernels.candidates import compute_candidates_
from ...kernels.chunk_filter import append_above_
from ...kernels.merge_rows import merge_rows_
from ...kernels.needed_product import product_if_
from ...kernels.token_topk import keep_listed_
from ..encoder import Operands
from .products import ProductChunk, chunk_width, encoder_chunks, unwritten_chunks
from .screen import LEAST_NORM, SUMS, RoundedOperands

# places of a token's list, times k and what k best of a stream in any order take; more than MODERATE_D numbers a token
# ask for more, since the bound beside the spread of the activations grows with the root of d
ROOM, ROOM_OF_MORE, MODERATE_D = 2, 5, 1024
# roundings of a sum, a bias and a bound, beyond those of the d terms
MORE_TERMS = 8
OF_BIAS = 2.0**-20
SMALLEST_NORMAL = 2.0**-126


class Hits(NamedTuple):
    """Entries that a filter let through, in any order: values fp32 [cap], keys int64 [cap], how many int64 [1].

    Unused places hold value 0 and key B * F; a number above cap says that some are missing.
    """

    values: Tensor
    keys: Tensor
    found: Tensor


def no_hits(operands: Operands, cap: int) -> Hits:
    """A list of `cap` unused places."""
    values = operands.x.new_zeros(cap, dtype=torch.float32)
    keys = torch.full((cap,), operands.n_tokens * operands.n_features, dtype=torch.int64, device=values.device)
    return Hits(values, keys, operands.x.new_zeros(1, dtype=torch.int64))


def in_order(values: Tensor, keys: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sorted by key, all of which are at most B * F: 32 bits, where they suffice, take half the passes."""
    keys, order = torch.sort(keys.int() if shape[0] * shape[1] < 2**31 else keys)
    return values.index_select(0, order), keys.long()


def hits_reaching(operands: Operands, floors: Tensor, cap: int, strict: bool) -> Hits:
    """Entries > 0 and >= floors fp32 [B], of their token, or with `strict` > floors fp32 [F], of their feature.

    Unused places stand between the others. More candidates than `cap` count as so many found, and the list is void.
    """
    x, W, b, scale, members, *_ = operands
    hits = no_hits(operands, cap)
    for chunk, spread in seen_chunks(operands):
        some = None
        if strict:
            some = floors[chunk.at if members is None else chunk.features]
        append_above_(chunk.z, chunk.b, chunk.scale, chunk.features, operands.n_features, floors, *hits, some, spread)
    found, computed = compute_candidates_(x, W, b, scale, floors, strict, *hits)
    rounded_of(operands).looks.see_entries(operands.n_tokens * operands.n_candidates, computed)
    return hits._replace(found=found)


def dense_above(operands: Operands, floors: Tensor, cap: int) -> Tensor:
    """(x W^T + b) * scale where that is > floors fp32 [F], and 0 elsewhere: fp32 [B, F]."""
    x, W, b, scale, *_ = operands
    hits = hits_reaching(operands, floors, cap, True)
    # unused places write to the one behind the last
    out = x.new_zeros(operands.n_tokens * operands.n_features + 1).scatter_(0, hits.keys, hits.values)
    out = out[:-1].view(operands.n_tokens, operands.n_features)
    product_if_((hits.found > cap).long(), x, W, 0, out, b, scale, floors)
    return out


def room_for_tokens(operands: Operands, k: int) -> int:
    """Places for the candidates of all tokens: the k best of the first of M chunks, k / 2 of the second, and so on."""
    n_chunks = -(-operands.n_candidates // max(chunk_width(operands.n_tokens), 1))
    room = ROOM if operands.x.shape[1] <= MODERATE_D else ROOM_OF_MORE
    return operands.n_tokens * math.ceil(room * (1 + math.log(max(n_chunks, 1))) * k)


def best_of_tokens(operands: Operands, k: int, cap: int) -> tuple[Tensor, Tensor]:
    """The k largest strictly positive entries of each token, ties to the lower feature, in a list of `cap` >= B * k.

    values fp32 [cap] and keys int64 [cap], by key but for unused places, whose value is 0.
    """
    x, W, b, scale, *_ = operands
    n_tokens, n_features = operands.n_tokens, operands.n_features
    floors, hits = candidates_of_tokens(operands, k, cap)
    _, computed = compute_candidates_(x, W, b, scale, floors, False, *hits)
    rounded_of(operands).looks.see_entries(n_tokens * operands.n_candidates, computed)
    values, keys = in_order(hits.values, hits.keys, (n_tokens, n_features))
    every_token = torch.arange(n_tokens + 1, device=x.device)
    keep_listed_(values, torch.searchsorted(keys, every_token * n_features), k)

    needed = (hits.found > cap) | floors.isnan().any()
    best, features = best_if(needed.long(), operands, k)
    n_places, more = n_tokens * k, cap - n_tokens * k
    full_keys = (every_token[:n_tokens, None] * n_features + features).view(n_places)
    values = torch.where(needed, pad(best.view(n_places), (0, more)), values)
    keys = torch.where(needed, pad(full_keys, (0, more), value=n_tokens * n_features), keys)
    return values, keys


def candidates_of_tokens(operands: Operands, k: int, cap: int) -> tuple[Tensor, Hits]:
    """What the k best of each token are at least, fp32 [B], and what may reach that, with upper bounds as values.

    No chunk outlives this: a full search that is needed after all takes memory for its own.
    """
    least, members = no_best(operands, k)
    floors, hits = least.new_zeros(operands.n_tokens), no_hits(operands, cap)
    for chunk, spread in seen_chunks(operands):
        merge_rows_(least, members, chunk.z, chunk.features, chunk.b, chunk.scale, spread)
        floors = least.amin(1)
        append_above_(chunk.z, chunk.b, chunk.scale, chunk.features, operands.n_features, floors, *hits, spread=spread)
    return floors, hits


def no_best(operands: Operands, k: int) -> tuple[Tensor, Tensor]:
    """Values [B, k] and features [B, k] as `merge_rows_` begins with them."""
    values = operands.x.new_zeros(operands.n_tokens, k, dtype=torch.float32)
    return values, torch.full((operands.n_tokens, k), 2**31 - 1, dtype=torch.int32, device=values.device)


def best_if(needed: Tensor, operands: Operands, k: int) -> tuple[Tensor, Tensor]:
    """The same without a screen, values and features [B, k], where `needed`, int64 [1], is not 0; else none."""
    values, features = no_best(operands, k)
    for chunk in unwritten_chunks(operands):
        product_if_(needed, operands.x, operands.W, chunk.features, chunk.z)
        merge_rows_(values, features, chunk.z, chunk.features, chunk.b, chunk.scale, needed=needed)
    return values, features


def seen_chunks(operands: Operands) -> Iterator[tuple[ProductChunk, Spread]]:
    """Chunks of the bfloat16 product, and how far each may be off."""
    screen = rounded_of(operands)
    spread = spread_of(operands)
    seen = operands._replace(x=screen.tokens.values, W=screen.weights.values, screen=None)
    for chunk in encoder_chunks(seen):
        at = chunk.at if operands.members is None else chunk.features
        yield chunk, Spread(*spread[:2], *(of_feature[at] for of_feature in spread[2:]))


def spread_of(operands: Operands) -> Spread:
    """Of x W^T + b: that of products of rounded operands, and of the roundings that float32 adds to both.

    A token of zeros has that of b alone, and a bias of -inf, that of a pruned feature, has none.
    """
    screen, d = rounded_of(operands), operands.x.shape[1]
    tokens, weights, n_terms = screen.tokens, screen.weights, d + MORE_TERMS
    # a term that leaves the range of float32 is small beside the least norm of a token that is not zeros
    of_least = SMALLEST_NORMAL * n_terms / (LEAST_NORM * d)
    of_norms = weights.errors + SUMS * n_terms * weights.rounded_norms + of_least
    some = operands.x.any(1)
    norms, errors = (torch.where(some, part, 0.0) for part in (tokens.rounded_norms, tokens.errors))
    size = operands.b.abs()
    of_bias = OF_BIAS * torch.where(size.isinf(), 0.0, size)
    return Spread(norms, errors, of_norms, weights.norms, of_bias)


def rounded_of(operands: Operands) -> RoundedOperands:
    assert isinstance(operands.screen, RoundedOperands)
    return operands.screen
