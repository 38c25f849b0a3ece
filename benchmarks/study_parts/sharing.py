"""What the tokens of a batch share: few features for much of it, the same features across topics; and the lottery."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from benchmarks.study_parts.probing import Encode
from sampled_sae import SampledSAE, SparseCodes

# a feature is rare that is active on fewer tokens than this share
RARE = 0.01
# in units of k: how many features of a batch "the first" are
FIRST = 4


@torch.no_grad()
def shared(sae: SampledSAE, encode: Encode, x: Tensor, batch_size: int) -> dict[str, float | None]:
    """On held-out activations x [n, d], batch by batch.

    - `first_share`: 1 - FVU of the reconstruction by those FIRST * k features of each batch that have the largest sum
      of squared activations in it.
    - `rare_entries`: share of the kept entries that are of features active on fewer than 1% of the tokens.
    - `rare_size`: mean activation of those entries over that of all entries.
    - `rare_squares`: their share of the sum of squared activations.
    """
    first = round(FIRST * sae.cfg.k)
    counts, sums, squares = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(3))
    errors = 0.0
    for batch in x.split(batch_size):
        codes = encode(batch)
        values, tokens, features = codes.entries()
        energy = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
        energy.index_add_(0, features, values.double().square())
        squares += energy
        sums.index_add_(0, features, values.double())
        counts += torch.bincount(features, minlength=sae.cfg.d_sae)
        is_first = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        is_first[energy.topk(first).indices] = True
        keep = is_first[features]
        few = SparseCodes(values[keep], tokens[keep], features[keep], codes.shape)
        errors += float((batch - sae.decode(few)).double().square().sum())
    rare = counts < RARE * len(x)
    entries = float(counts[rare].sum() / counts.sum())
    return {
        "first_share": 1 - errors / float((x.double() - x.double().mean(0)).square().sum()),
        "rare_entries": entries,
        "rare_size": float(sums[rare].sum() / counts[rare].sum() / (sums.sum() / counts.sum())) if entries else None,
        "rare_squares": float(squares[rare].sum() / squares.sum()),
    }


def topics_jaccard(z: Tensor, labels: Tensor) -> float:
    """Mean Jaccard, over pairs of classes, of the features that hold 90% of the activation in a class's items.

    z: `pooled` codes [n, F]. labels: [n].
    """
    sets = [_holding(z[labels == one].sum(0), 0.9) for one in labels.unique()]
    pairs = [float((a & b).sum() / (a | b).sum()) for a, b in combinations(sets, 2)]
    return sum(pairs) / len(pairs)


def _holding(mass: Tensor, share: float) -> Tensor:
    """bool [F]: the fewest features that hold so much of the mass."""
    ordered, order = mass.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    held = torch.zeros_like(mass, dtype=torch.bool)
    held[order[before < share * mass.sum()]] = True
    return held
