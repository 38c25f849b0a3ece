"""Every activation above the floor of its feature, without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache (column_filter.py). With a screen it is a bfloat16 product (plain_screen.py where
both operands hold no more, bounded_screen.py for all others), and what that cannot rule out is computed again, one by
one. Tokens that have to be prepared are prepared a few at a time, for a product in full precision as many as its room
allows. Where a rule lets so much through that lists of entries cost more than the product, whole rows of activations
are computed for a few tokens at a time: the same memory, whatever the share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...codes import Entries
from ...support.even_slices import even_slices
from ...support.reused_memory import scratch
from ..encoder import Operands
from ..rounded_tokens import PIECE_ELEMENTS
from .column_filter import places_reaching
from .look_through import LookThrough, room_of
from .products import activations_at, candidate_spans, ends_of_tokens, sampled_product
from .search import MOST_SCREENED, join

# elements of tokens that are looked at together: for fewer the weights would be read, and rounded, more often
TOKEN_ELEMENTS = 1 << 22
# the same where they are prepared for a product in full precision, at least: else a part of what a search may hold
PREPARED_ELEMENTS, OF_PREPARED = 1 << 18, 0.5
# candidates that wait, at most, for the end of a search, when its rounded tokens have gone; and computed together
MOST_WAITING = 1 << 17
MOST_SETTLED = 1 << 14
# a rule that lets more than this share of a batch through gets whole rows
MOST_LISTED = 1 / 64
# entries found before that share is looked at, and activations seen before a screen's
FEWEST_LISTED = 1 << 16
FEWEST_SEEN = 1 << 20
# activations in whole rows at once, elements of their tokens, and tokens at least: fewer would make a slow product
ROW_ELEMENTS = 1 << 22
ROW_TOKEN_ELEMENTS = 1 << 19
FEWEST_TOKENS = 32


def entries_above(operands: Operands, floor: Tensor) -> Entries:
    """Every entry of (x W^T + b) * scale strictly above the floor, [1] or [F], sorted by token, then feature."""
    search = FloorSearch(floor)
    found = [moved(search.among(block), at.start) for at, block in blocks_of_tokens(operands)]
    # no token: of a process whose part of a batch is empty
    return join(found) if found else Found(operands).entries()


def blocks_of_tokens(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands), in blocks of about the same size."""
    n_tokens, most = operands.n_tokens, TOKEN_ELEMENTS
    if operands.screen is None and not operands.is_exact:
        room = OF_PREPARED * room_of(n_tokens, operands.n_features) / operands.b.element_size()
        most = min(most, max(PREPARED_ELEMENTS, int(room)))
    for at in even_slices(n_tokens, operands.x.shape[1], most):
        yield at, operands.of_tokens(at)


class Found:
    """Entries of a block [T, F] that were found so far: their values, and their places in it, flat."""

    def __init__(self, block: Operands) -> None:
        self.n_features = block.n_features
        self.values: list[Tensor] = [block.b.new_zeros(0)]
        self.places: list[Tensor] = [block.b.new_zeros(0, dtype=torch.int64)]
        self.count = 0

    def add(self, values: Tensor, places: Tensor) -> None:
        self.values.append(values)
        self.places.append(places)
        self.count += len(values)

    def entries(self) -> Entries:
        """All of them by token, then feature; they are no longer held here."""
        places, self.places = torch.cat(self.places), []
        values, self.values = torch.cat(self.values), []
        if not bool((places[1:] > places[:-1]).all()):
            places, order = places.sort()
            values = values.index_select(0, order)
        tokens = places // self.n_features
        return Entries(values, tokens, places.sub_(tokens * self.n_features))


class FloorSearch:
    """One batch's search; what it learns from a block of tokens, it does not try again with the next.

    Attributes:
        screens: those that it may still look through, in the order in which they are tried. listing: whether it lists
            the entries of chunks, and does not compute whole rows.
    """

    def __init__(self, floor: Tensor) -> None:
        self.floor = floor
        self.screens = ["plain", "bounded"]
        self.listing = True

    def among(self, block: Operands) -> Entries:
        """The entries of a block of tokens."""
        found = self.listed(block) if self.listing else None
        return found if found is not None else in_whole_rows(block, self.floor)

    def listed(self, block: Operands) -> Entries | None:
        """The same chunk by chunk; None where there are too many."""
        look, found, start = LookThrough(block, self.floor, self.screens), Found(block), 0
        waiting: list[Tensor] = []
        n_waiting = 0
        while start < block.n_features:
            span = slice(start, min(start + look.width(), block.n_features))
            seen = self._screened(look, span)
            if seen is None and block.screen is not None and not block.is_exact:
                return self._in_smaller_blocks(block)
            if seen is None:
                found.add(*self._in_full(look.full, span))
            else:
                waiting.append(seen)
                n_waiting += len(seen)
            start = span.stop
            most = max(FEWEST_LISTED, MOST_LISTED * block.n_tokens * start)
            if n_waiting >= MOST_WAITING or found.count + n_waiting > most:
                self._settle(block, waiting, found)
                n_waiting = 0
            if found.count > most:
                self.listing = False
                return None
        look.let_go()
        self._settle(block, waiting, found)
        return found.entries()

    def _in_smaller_blocks(self, block: Operands) -> Entries | None:
        """Without a screen: so many tokens are not prepared together."""
        found = []
        for at, part in blocks_of_tokens(block.in_full()):
            entries = self.listed(part)
            if entries is None:
                return None
            found.append(moved(entries, at.start))
        return join(found)

    def _screened(self, look: LookThrough, span: slice) -> Tensor | None:
        """Places that a screen leaves open; None where there is no screen that leaves few enough."""
        n_seen = look.block.n_tokens * (span.stop - span.start)
        while look.screen is not None:
            seen = look.through(span)
            if seen is not None:
                tokens, features = seen
                look.count(n_seen, len(tokens))
                if len(tokens) <= MOST_SCREENED * max(n_seen, FEWEST_SEEN):
                    return narrow(in_block(tokens, features, look.block.n_features), look.block)
            look.drop()
        return None

    def _settle(self, block: Operands, waiting: list[Tensor], found: Found) -> None:
        """All candidates in full precision: those above their floor are found."""
        if waiting:
            places = torch.cat(waiting).sort().values
            waiting.clear()
            for some in places.split(MOST_SETTLED):
                found.add(*self._settled(block, some.long()))

    def _settled(self, block: Operands, places: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates, sorted, in full precision: (values, places) of those above their floor."""
        tokens = places // block.n_features
        features, ends = places - tokens * block.n_features, ends_of_tokens(tokens, block.n_tokens)
        values = products_at(block, ends, features)
        values += block.b.index_select(0, features)
        if block.scale is not None:
            values *= block.scale.index_select(0, features)
        return self._above(values, places, features)

    def _in_full(self, block: Operands, span: slice) -> tuple[Tensor, Tensor]:
        """The same of a chunk from a product in full precision."""
        floor = self._finite(span)
        a = activations_at(block, span)
        tokens, columns = places_reaching(a, torch.nextafter(floor, torch.full_like(floor, torch.inf)))
        features = columns + span.start
        return self._above(a[tokens, columns], in_block(tokens, features, block.n_features), features)

    def _above(self, values: Tensor, places: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        floor = self.floor if len(self.floor) == 1 else self.floor.index_select(0, features)
        at = (values > floor).nonzero().squeeze(1)
        return values.index_select(0, at), places.index_select(0, at)

    def _finite(self, span: slice) -> Tensor:
        """The floors of a chunk, [1] or [C].

        An activation that left the range of float32 is above no infinite floor: values are compared in the end.
        """
        floor = self.floor if len(self.floor) == 1 else self.floor[span]
        return floor.clamp(max=torch.finfo(floor.dtype).max)


def moved(entries: Entries, first: int) -> Entries:
    """Those of a block of tokens that begins with token `first`."""
    entries.tokens.add_(first)
    return entries


def in_block(tokens: Tensor, features: Tensor, n_features: int) -> Tensor:
    """Places in a flat [T, F]."""
    return tokens.mul_(n_features).add_(features)


def narrow(places: Tensor, block: Operands) -> Tensor:
    """Places of candidates, which wait in as few bytes as hold them."""
    return places.int() if block.n_tokens * block.n_features < 1 << 31 else places


def products_at(block: Operands, ends: Tensor, features: Tensor) -> Tensor:
    """`sampled_product` of a block's tokens and weights; tokens that have to be prepared are, a few at a time."""
    if block.is_exact:
        return sampled_product(block.x, block.W, ends, features)
    step = max(1, PIECE_ELEMENTS // block.x.shape[1])
    bounds, parts = [*ends[::step].tolist(), len(features)], []
    for first, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            at = slice(first * step, min((first + 1) * step, block.n_tokens))
            own = ends[at.start : at.stop + 1] - start
            parts.append(sampled_product(block.exact(at), block.W, own, features[start:stop]))
    return torch.cat(parts) if parts else block.b.new_zeros(0)


def in_whole_rows(block: Operands, floor: Tensor) -> Entries:
    """Entries of dense rows of activations, a few tokens at a time."""
    found = []
    for at, part in row_blocks(block):
        a = scratch(block.b, part.n_tokens, block.n_features)
        dense_activations(part, a)
        tokens, features = (a > floor).nonzero(as_tuple=True)
        found.append(Entries(a[tokens, features], tokens + at.start, features))
    return join(found)


def row_blocks(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands): few enough for whole rows of activations."""
    n_features, d = operands.W.shape
    step = max(FEWEST_TOKENS, min(ROW_ELEMENTS // n_features, ROW_TOKEN_ELEMENTS // d))
    for start in range(0, operands.n_tokens, step):
        at = slice(start, min(start + step, operands.n_tokens))
        yield at, operands.of_tokens(at)


def dense_activations(operands: Operands, out: Tensor) -> None:
    """(x W^T + b) * scale into `out` [B, F], before the relu."""
    x, W, b, scale, *_ = operands = operands.raised()
    if W.dtype == x.dtype:
        torch.addmm(b, x, W.t(), out=out)
        if scale is not None:
            out.mul_(scale)
        return
    for span in candidate_spans(operands):
        out[:, span] = activations_at(operands, span)[:, : span.stop - span.start]
