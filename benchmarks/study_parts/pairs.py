"""Whether another seed finds the same dictionary: kept SAEs of one variant, matched two by two."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch

from benchmarks.study_parts.real import DECODER, decoder_of
from benchmarks.study_parts.rows import Row
from sampled_sae.comparison import match_features

# cosine of decoder rows from which two features are the same
SAME = 0.7


def pairs_of(folder: Path, name: str, tokens: int, seeds: list[int]) -> Iterator[Row]:
    """A row for each two of the seeds whose SAEs are kept in `folder` and have been measured.

    Of the features that a held-out token activates: `cosine`, the mean of matched decoder rows; `shared`, the share of
    pairs of at least SAME; `shared_entries`, the share of kept entries that are of features in such pairs.
    """
    places = {seed: folder / f"{name}_{tokens}_{seed}" for seed in seeds}
    found = {seed: decoder_of(place) for seed, place in places.items() if (place / DECODER).exists()}
    for one, other in combinations(found, 2):
        (rows, counts), (others, other_counts) = ((r[c > 0], c[c > 0].double()) for r, c in (found[one], found[other]))
        matching = match_features(rows, others)
        same = matching.shared(SAME)
        sides = ((counts, matching.a), (other_counts, matching.b))
        entries = [of_side[which[same]].sum() / of_side.sum() for of_side, which in sides]
        yield {
            "name": name,
            "seed": f"{one}-{other}",
            "tokens": tokens,
            "active": (len(rows) + len(others)) / 2,
            "cosine": float(matching.cosine.double().mean()),
            "shared": float(same.double().mean()),
            "shared_entries": float(torch.stack(entries).mean()),
        }
