"""Whether matched features fire on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import SparseCodes
from ..inference.inference_sae import InferenceSAE
from ..support.argument_checks import check_activations, check_integer
from .matching import Matching

Counts = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Agreement:
    """On n tokens of activations that both SAEs read.

    Attributes:
        tokens: n.
        l0, fvu: of A and of B; FVU is NaN where the activations do not vary.
        x_hat_cosine: mean over tokens of the cosine of both reconstructions.
        active_a, active_b: int64 [F], on how many tokens each feature is active.
        jaccard: float64 [m], of each pair: tokens where both are active over those where one is; NaN where neither is.
        activation_cosine: float64 [m], of each pair: cosine of the activations over all tokens; NaN likewise.
        overlap: mean over tokens of 2 |both| / (|A| + |B|), the share of active features whose partner in a pair of at
            least `same` is active too.
    """

    tokens: int
    l0: tuple[float, float]
    fvu: tuple[float, float]
    x_hat_cosine: float
    active_a: Counts
    active_b: Counts
    jaccard: Counts
    activation_cosine: Counts
    overlap: float


def check_both_read(a: InferenceSAE, b: InferenceSAE, x: Tensor) -> None:
    """ValueError, TypeError: activations that one of them does not read; a transcoder, which reconstructs others."""
    for name, sae in (("a", a), ("b", b)):
        if sae.cfg.is_transcoder:
            raise ValueError(f"{name}: is a transcoder, whose reconstructions are of other activations")
        check_activations(x, sae.cfg.d_in)


@torch.no_grad()
def agreement(
    a: InferenceSAE, b: InferenceSAE, x: Tensor, matching: Matching, *, same: float = 0.7, batch_size: int = 2048
) -> Agreement:
    """Encodes x [n, d] with both, a batch at a time.

    Raises:
        ValueError, TypeError: activations that one of them does not read; a transcoder, which reconstructs others.
    """
    check_integer("batch_size", batch_size, 1)
    check_both_read(a, b, x)
    pairs = [_pair_of(side, sae.cfg.d_sae) for side, sae in ((matching.a, a), (matching.b, b))]
    close = matching.shared(same).numpy()
    m = len(close)
    both, dots, squares = np.zeros(m, dtype=np.int64), np.zeros(m), np.zeros((2, m))
    active = [np.zeros(sae.cfg.d_sae, dtype=np.int64) for sae in (a, b)]
    errors, cosines, overlap = np.zeros(2), 0.0, 0.0
    for batch in x.split(batch_size):
        codes = [sae.encode_sparse(batch) for sae in (a, b)]
        x_hats = [sae.decode(c, x=batch).to(batch.dtype) for sae, c in zip((a, b), codes)]
        errors += [float((batch - x_hat).double().square().sum()) for x_hat in x_hats]
        cosines += float(torch.nn.functional.cosine_similarity(x_hats[0], x_hats[1], dim=1).double().sum())
        keys, values = [], []
        for side, c in enumerate(codes):
            active[side] += np.bincount(c.features.cpu().numpy(), minlength=len(active[side]))
            key, value = _entries(c, pairs[side], m)
            squares[side] += np.bincount(key % m, value**2, minlength=m)
            keys.append(key)
            values.append(value)
        common, at_a, at_b = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
        pair = common % m
        both += np.bincount(pair, minlength=m)
        dots += np.bincount(pair, values[0][at_a] * values[1][at_b], minlength=m)
        overlap += _overlap(codes, common[close[pair]] // m, len(batch))
    # all tokens alike have no variance to explain
    deviations = float((x.double() - x.double().mean(0)).square().sum()) or float("nan")
    active_a, active_b = active
    either = active_a[matching.a.numpy()] + active_b[matching.b.numpy()] - both
    with np.errstate(invalid="ignore"):
        jaccard, activation_cosine = both / either, dots / np.sqrt(squares[0] * squares[1])
    n = len(x)
    l0 = (float(active_a.sum()) / n, float(active_b.sum()) / n)
    fvu = (float(errors[0] / deviations), float(errors[1] / deviations))
    return Agreement(n, l0, fvu, cosines / n, active_a, active_b, jaccard, activation_cosine, overlap / n)


def _pair_of(side: Tensor, n_features: int) -> Counts:
    """The number of the pair of each feature, -1 for one alone."""
    pairs = np.full(n_features, -1, dtype=np.int64)
    pairs[side.numpy()] = np.arange(len(side))
    return pairs


def _entries(codes: SparseCodes, pair_of: Counts, m: int) -> tuple[Counts, Counts]:
    """(token * m + pair, activation) of the entries of features that have a pair."""
    values, tokens, features = (t.detach().cpu().numpy() for t in codes.entries())
    pair = pair_of[features]
    paired = pair >= 0
    return tokens[paired] * m + pair[paired], values[paired].astype(np.float64)


def _overlap(codes: list[SparseCodes], tokens_of_both: Counts, n: int) -> float:
    """Sum over n tokens of 2 |both| / (|A| + |B|); 1 where neither has an active feature."""
    active = sum(np.bincount(c.tokens.cpu().numpy(), minlength=n) for c in codes)
    both = np.bincount(tokens_of_both, minlength=n)
    return float(np.where(active > 0, 2 * both / np.maximum(active, 1), 1.0).sum())
