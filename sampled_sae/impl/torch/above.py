"""Every activation above the floor of its feature, without [B, F]: chunks of the encoder product through a filter.

A chunk [B, C] is filtered in cache (column_filter.py). With a screen it is a bfloat16 product (plain_screen.py where
both operands hold no more, bounded_screen.py for all others), and what that cannot rule out is computed again, one by
one (settling.py). Tokens are taken in blocks, so that what is made of them, rounded or prepared, has room. Where a rule
lets so much through that lists of entries cost more than the product, whole rows of activations are computed for a few
tokens at a time: the same memory, whatever the share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...codes import Entries, joined
from ...support.even_slices import even_slices
from ...support.reused_memory import scratch
from ..encoder import Operands
from .column_filter import places_reaching
from .look_through import MOST_TOKENS, LookThrough, is_held, room_of
from .products import activations_at, candidate_spans, raised, token_blocks
from .screen import least_in_full
from .search import MOST_SCREENED
from .settling import Candidates, flat_places

# elements of tokens that are looked at together: for fewer the weights would be read, and rounded, more often
TOKEN_ELEMENTS = 1 << 22
# tokens at least that weights are rounded for, and bytes of the room that rounded tokens leave to all else
FEWEST_ROUNDED, BESIDE_ROUNDED = 512, 5e6
# elements of tokens that are prepared for a product in full precision, at least: else a part of what a search may hold
PREPARED_ELEMENTS, OF_PREPARED = 1 << 18, 0.5
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
    search = FloorSearch(operands, floor)
    found = [moved(search.of_block(block), at.start) for at, block in blocks_of_tokens(operands, search.room)]
    # no token: of a process whose part of a batch is empty
    return Entries.joined(found) if found else Entries.none(operands.b)


def blocks_of_tokens(operands: Operands, room: float) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands), in blocks of about the same size; `room` in bytes is what a search may hold."""
    n_tokens, d = operands.x.shape
    most = min(TOKEN_ELEMENTS, MOST_TOKENS * d)
    if operands.screen is None and not operands.is_exact:
        most = min(most, max(PREPARED_ELEMENTS, int(OF_PREPARED * room / operands.b.element_size())))
    elif operands.screen is not None and not is_held(operands):
        most = min(most, max(FEWEST_ROUNDED * d, int(room - BESIDE_ROUNDED) // 2))
    for at in even_slices(n_tokens, d, most):
        yield at, operands.of_tokens(at)


class Found:
    """Entries of a block [T, F] that were found so far: their values, and their places in it, flat."""

    def __init__(self, block: Operands) -> None:
        self.n_features = block.n_features
        self.values: list[Tensor] = [block.b.new_zeros(0)]
        none = block.b.new_zeros(0, dtype=torch.int64)
        self.places: list[Tensor] = [flat_places(block, none, none, self.n_features)]
        self.count = 0

    def add(self, values: Tensor, places: Tensor) -> None:
        self.values.append(values)
        self.places.append(places)
        self.count += len(values)

    def entries(self) -> Entries:
        """All of them by token, then feature; they are no longer held here."""
        places, values = joined(self.places), joined(self.values)
        if not bool((places[1:] > places[:-1]).all()):
            places, order = places.sort()
            values = values.index_select(0, order)
            del order
        tokens = places // self.n_features
        features = places.sub_(tokens * self.n_features)
        return Entries(values, tokens.long(), features.long())


class FloorSearch:
    """One batch's search; what it learns from a block of tokens, it does not try again with the next.

    Args:
        operands: of the whole batch.

    Attributes:
        room: bytes that it may hold. screens: those that it may still look through, in the order in which they are
            tried. listing: whether it lists the entries of chunks, and does not compute whole rows.
    """

    def __init__(self, operands: Operands, floor: Tensor) -> None:
        self.floor, self.room = floor, room_of(operands.n_tokens, operands.n_features)
        self.screens = ["plain", "bounded"]
        self.listing = True

    def of_block(self, block: Operands) -> Entries:
        """The entries of a block of tokens."""
        found = self.listed(block) if self.listing else None
        return found if found is not None else in_whole_rows(block, self.floor)

    def listed(self, block: Operands) -> Entries | None:
        """The same chunk by chunk; None where there are too many."""
        waiting, found, start = Candidates(block, self.room), Found(block), 0
        look = LookThrough(block, self.floor, self.screens, self.room - waiting.held)
        while start < block.n_features:
            span = slice(start, min(start + look.width(), block.n_features))
            seen = self._screened(look, span)
            if seen is None and block.screen is not None and not block.is_exact:
                waiting.let_go()
                return self._in_smaller_blocks(block)
            if seen is None:
                found.add(*self._in_full(look.full, span))
            else:
                waiting.add(*seen)
            start = span.stop
            most = max(FEWEST_LISTED, MOST_LISTED * block.n_tokens * start)
            if waiting.are_many or found.count + waiting.count > most:
                self._settle(waiting, found)
            if found.count > most:
                self.listing = False
                look.let_go()
                return None
        look.let_go()
        self._settle(waiting, found)
        waiting.let_go()
        return found.entries()

    def _in_smaller_blocks(self, block: Operands) -> Entries | None:
        """Without a screen: so many tokens are not prepared together."""
        found = []
        for at, part in blocks_of_tokens(block.in_full(), self.room):
            entries = self.listed(part)
            if entries is None:
                return None
            found.append(moved(entries, at.start))
        return Entries.joined(found)

    def _screened(self, look: LookThrough, span: slice) -> tuple[Tensor, Tensor] | None:
        """(tokens, features) that a screen leaves open; None where there is no screen that leaves few enough."""
        n_seen = look.block.n_tokens * (span.stop - span.start)
        while look.screen is not None:
            seen = look.through(span)
            if seen is not None:
                assert look.block.screen is not None
                look.block.screen.looks.see_entries(n_seen, len(seen[0]))
                if len(seen[0]) <= MOST_SCREENED * max(n_seen, FEWEST_SEEN):
                    return seen
            look.drop()
        return None

    def _settle(self, waiting: Candidates, found: Found) -> None:
        """All candidates in full precision: those above their floor are found."""
        for z, tokens, features in waiting.products():
            found.add(*self._above(waiting.block, z, tokens, features))

    def _in_full(self, block: Operands, span: slice) -> tuple[Tensor, Tensor]:
        """(values, places) above their floor in a chunk, from a product in full precision."""
        z = scratch(block.x, block.n_tokens, span.stop - span.start)
        torch.mm(block.x, raised(block.W[span], block.x).t(), out=z)
        tokens, columns = places_reaching(z, least_in_full(block, self.floor, span))
        return self._above(block, z[tokens, columns], tokens, columns.add_(span.start))

    def _above(self, block: Operands, z: Tensor, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(values, places) of those products whose activation is above its floor."""
        values = z.add_(block.b.index_select(0, features))
        if block.scale is not None:
            values *= block.scale.index_select(0, features)
        floor = self.floor if len(self.floor) == 1 else self.floor.index_select(0, features)
        at = (values > floor).nonzero().squeeze(1)
        places = tokens.index_select(0, at), features.index_select(0, at)
        return values.index_select(0, at), flat_places(block, *places, block.n_features)


def moved(entries: Entries, first: int) -> Entries:
    """Those of a block of tokens that begins with token `first`."""
    entries.tokens.add_(first)
    return entries


def in_whole_rows(block: Operands, floor: Tensor) -> Entries:
    """Entries of dense rows of activations, a few tokens at a time."""
    found = []
    for at, part in row_blocks(block):
        a = scratch(block.b, part.n_tokens, block.n_features)
        dense_activations(part, a)
        tokens, features = (a > floor).nonzero(as_tuple=True)
        found.append(Entries(a[tokens, features], tokens + at.start, features))
    return Entries.joined(found)


def row_blocks(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """(some tokens, their operands): few enough for whole rows of activations."""
    n_features, d = operands.W.shape
    return token_blocks(operands, max(FEWEST_TOKENS, min(ROW_ELEMENTS // n_features, ROW_TOKEN_ELEMENTS // d)))


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
