"""Which entries of all processes are kept: exact, with a number of collectives that does not depend on the values.

By batch, the cut is found digit by digit from the highest: each pass counts the digits of the entries that share those
found so far, in a histogram that is summed over the processes. Positive floats sort as their bits do. Entries equal to
the cut are kept in (token, feature) order, which one exchange of their numbers settles. By token, each process of
`feature` shows the k largest of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .mesh import Mesh

# of a digit: 3 of them make 32 bits
DIGIT = 11


class Cut(NamedTuple):
    """bits: of the smallest value that is kept, int64 0-dim; 0 where all positive ones are. ties: how many of the
    entries equal to it are kept, int64 0-dim."""

    bits: Tensor
    ties: Tensor


def sort_bits(values: Tensor) -> Tensor:
    """Values >= 0 as integers in the same order; 0 for what is not positive."""
    integers = torch.int64 if values.dtype == torch.float64 else torch.int32
    return torch.where(values > 0, values, 0).view(integers)


def find_cut(bits: Tensor, n: int, mesh: Mesh) -> Cut:
    """The n-th largest of the positive entries of all processes, from the `sort_bits` of those here."""
    size = low = torch.iinfo(bits.dtype).bits
    bits = bits.flatten()
    positive = bits > 0
    prefix = bits.new_zeros((), dtype=torch.int64)
    left = torch.full_like(prefix, n)
    while low > 0:
        high, low = low, max(low - DIGIT, 0)
        # the sign bit is 0: a shift by all but one bit leaves the empty prefix of the first pass
        within = positive & ((bits >> min(high, size - 1)) == prefix)
        digits = (bits >> low) & ((1 << (high - low)) - 1)
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=bits.device)
        mesh.sum_(counts.scatter_add_(0, digits.long(), within.long()), "radix counts")
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = ((at_least >= left).sum() - 1).clamp_min(0)
        # not by indexing, which waits for a device
        left = left - (at_least - counts).index_select(0, digit.view(1)).squeeze(0)
        prefix = (prefix << (high - low)) | digit
    return Cut(prefix, left)


def keep_of_block(bits: Tensor, cut: Cut, mesh: Mesh) -> Tensor:
    """Mask of the kept entries of a block [B, P], whose columns are features in ascending order."""
    tied = (bits == cut.bits) & (bits > 0)
    before = ties_before(tied.sum(1), mesh)
    return (bits > cut.bits) | (tied & (before[:, None] + tied.cumsum(1) <= cut.ties))


def keep_of_entries(bits: Tensor, tokens: Tensor, n_tokens: int, cut: Cut, mesh: Mesh) -> Tensor:
    """Mask of the kept ones of entries sorted by token, then feature; behind them may stand padding of value 0."""
    tied = (bits == cut.bits) & (bits > 0)
    rank = tied.cumsum(0)
    of_token = rank.new_zeros(n_tokens + 1).index_add_(0, tokens.long(), tied.long())[:-1]
    here = of_token.cumsum(0) - of_token
    before = torch.cat((ties_before(of_token, mesh) - here, here.new_zeros(1)))  # one more for the padding
    return (bits > cut.bits) | (tied & (before[tokens.long()] + rank <= cut.ties))


def ties_before(of_token: Tensor, mesh: Mesh) -> Tensor:
    """int64 [B]: how many entries equal to the cut stand before those of each token here, which has `of_token`."""
    of_token = of_token.int()
    of_ranks = mesh.feature.gather(of_token, "ties").long()
    total = of_ranks.sum(0)
    of_batches = mesh.data.gather(total.sum(), "ties")
    before = of_batches[: mesh.data.rank].sum() + total.cumsum(0) - total
    return before + of_ranks[: mesh.feature.rank].sum(0)


def keep_of_tokens(best: Tensor, k: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Of the k largest values of each token here, [B, k] padded with 0: the cut [B], and how many equal to it are kept.

    Ties go to the lower feature, and so to the lower process of `feature`.
    """
    of_ranks = mesh.feature.gather(best, "largest of tokens")  # [R, B, k]
    together = of_ranks.permute(1, 0, 2).flatten(1)
    cut = together.topk(k, dim=1, sorted=False).values.amin(1)
    above = (together > cut[:, None]).sum(1)
    tied = (of_ranks == cut[:, None]).sum(2)  # [R, B]
    return cut, k - above - tied[: mesh.feature.rank].sum(0)


def table_of(values: Tensor, tokens: Tensor, n_tokens: int, k: int) -> Tensor:
    """[B, k]: the values of entries sorted by token, of which none has more than k; 0 where one has fewer."""
    tokens = tokens.long()
    counts = torch.zeros(n_tokens + 1, dtype=torch.int64, device=values.device).index_add_(
        0, tokens, torch.ones_like(tokens)
    )
    place = torch.arange(len(tokens), device=values.device) - (counts.cumsum(0) - counts)[tokens]
    table = values.new_zeros(n_tokens + 1, k)  # one more row for the padding
    real = tokens < n_tokens
    table[tokens, torch.where(real, place, 0)] = torch.where(real, values, 0)
    return table[:-1]
