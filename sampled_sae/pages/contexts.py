"""The texts around tokens, with the activations of a feature on every token of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inference.codes_store import CodesStore
from .activity import Activity
from .html import short

BEFORE, AFTER = 14, 8
QUANTILES = 4


@dataclass(frozen=True)
class CorpusText:
    """Where the tokens of a corpus stand in its rows.

    Attributes:
        rows: int64 [R, context], token ids.
        token_rows, positions: int64 [N], as in `TokenPlaces`, with rows counted over all shards.
    """

    rows: Tensor
    token_rows: Tensor
    positions: Tensor

    @classmethod
    def read(cls, store: CodesStore, n_shards: int) -> CorpusText | None:
        """Of the first shards of a store; None without text."""
        rows, token_rows, positions, first = [], [], [], 0
        for i in range(n_shards):
            places = store.places(i)
            if places is None:
                return None
            rows.append(places.rows.long())
            token_rows.append(places.token_rows.long() + first)
            positions.append(places.positions.long())
            first += len(places.rows)
        return cls(torch.cat(rows), torch.cat(token_rows), torch.cat(positions)) if rows else None

    @property
    def ids(self) -> Tensor:
        """int64 [N], the tokens' own ids."""
        return self.rows[self.token_rows, self.positions]

    def first_of_each_row(self, tokens: Tensor) -> Tensor:
        """The tokens without those whose row an earlier one of them has."""
        found: dict[int, int] = {}
        for token, row in zip(tokens.tolist(), self.token_rows[tokens].tolist()):
            found.setdefault(row, token)
        return torch.tensor(list(found.values()), dtype=torch.int64)

    def windows(self, activity: Activity, feature: int, tokens: Tensor, word_of: Tensor) -> list[dict[str, Any]]:
        """A context for each of the tokens, as the page reads it.

        value: the activation. row, position: where the token stands. words: of the row around it, by `word_of`, which
        maps token ids to numbers of words. at: the token's place in them. on: place and activation of each active one.
        """
        row, position = self.token_rows[tokens], self.positions[tokens]
        start = (position - BEFORE).clamp(min=0)
        near = tokens[:, None] + torch.arange(-BEFORE, AFTER + 1)
        there = near.clamp(0, len(self.positions) - 1)
        place = self.positions[there] - start[:, None]
        inside = (near == there) & (self.token_rows[there] == row[:, None])
        inside &= (place >= 0) & (place <= (position - start + AFTER)[:, None])
        values = torch.where(inside, activity.at(there, feature), 0)
        found = []
        own = zip(row.tolist(), position.tolist(), start.tolist(), place.tolist(), values.tolist())
        for at_row, at_position, begin, places, acts in own:
            ids = self.rows[at_row, begin : at_position + AFTER + 1]
            found.append(
                {
                    "value": short(acts[BEFORE]),
                    "row": at_row,
                    "position": at_position,
                    "words": word_of[ids].tolist(),
                    "at": at_position - begin,
                    "on": [[p, short(a)] for p, a in zip(places, acts) if a > 0],
                }
            )
        return found


def top_tokens(activity: Activity, text: CorpusText, feature: int, n: int) -> Tensor:
    """The n tokens of greatest activation, each of another row; fewer where there are fewer rows."""
    # a feature that fires on every token of a row needs more to choose from
    ranked = activity.tokens[activity.ranked(feature)[: 8 * n]]
    return text.first_of_each_row(ranked)[:n]


def quantile_tokens(activity: Activity, feature: int, n: int) -> list[Tensor]:
    """n tokens from each quarter of a feature's active tokens, greatest activations first, at even distances."""
    ranked = activity.ranked(feature)
    found = []
    for part in torch.tensor_split(ranked, QUANTILES):
        even = torch.linspace(0, len(part) - 1, min(n, len(part))).long() if len(part) else torch.empty(0).long()
        found.append(activity.tokens[part[even]])
    return found
