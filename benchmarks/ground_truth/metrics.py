"""How well an SAE finds features that are known.

The definitions are those of SynthSAEBench (sae_lens.synthetic.evals), computed from sparse codes: no [B, F] and no
[F, N] beyond one matrix of cosines. F features of an SAE, N true ones, in d dimensions. An SAE's feature stands for the
true one to which its decoder row has the largest absolute cosine; ties go to the lower.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ground_truth.absorption import Absorption
from sampled_sae import SampledSAE, SparseCodes


class Batch(NamedTuple):
    """Activations x [B, d] and which true features are in them, bool [B, N]."""

    x: Tensor
    firing: Tensor


def cosines(decoder: Tensor, truth: Tensor) -> Tensor:
    """Absolute cosine of every decoder row [F, d] and every true feature [N, d], [F, N]; 0 for a row of zeros."""
    one, other = (torch.nn.functional.normalize(t.detach().double(), dim=1) for t in (decoder, truth))
    return (one @ other.t()).abs().float()


def mean_correlation(cosine: Tensor) -> float:
    """MCC of `cosines` [F, N]: their mean over the one-to-one assignment that makes it largest, min(F, N) pairs.

    Equivalent to the maximum of `cosine[range(F), p].mean()` over permutations p. arXiv 2505.20254.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return float(cosine[rows, columns].double().mean())


class Detection:
    """Precision, recall and F1 of each feature as a detector of the true one that it stands for; their means.

    Copies of a feature each count in these means, as in SynthSAEBench; `found` counts a true feature once.

    matches: int64 [F]. A quotient of 0 and 0 counts as 0, so that a feature that never fires lowers all three.
    """

    def __init__(self, matches: Tensor) -> None:
        self.matches = matches
        self.hits, self.active, self.true = (torch.zeros(len(matches), dtype=torch.int64) for _ in range(3))
        self.tokens = 0

    def add(self, codes: SparseCodes, firing: Tensor) -> None:
        """One batch: codes [B, F], firing bool [B, N]."""
        _, tokens, features = (t.cpu() for t in codes.entries())
        right = firing[tokens, self.matches[features]]
        n = len(self.matches)
        self.active += torch.bincount(features, minlength=n)
        self.hits += torch.bincount(features[right], minlength=n)
        self.true += firing.sum(0)[self.matches]
        self.tokens += len(firing)

    def result(self) -> dict[str, float]:
        """`precision`, `recall`, `f1`, `l0`; `dead`, the number of features that never fired; `found`, how many
        different true features have a detector with an F1 above a half."""
        precision, recall = self.hits / self.active.clamp(min=1), self.hits / self.true.clamp(min=1)
        both = precision + recall
        f1 = torch.where(both > 0, 2 * precision * recall / both, 0)
        of_each = {"precision": precision, "recall": recall, "f1": f1}
        means = {name: float(t.double().mean()) for name, t in of_each.items()}
        found, dead = len(self.matches[f1 > 0.5].unique()), int((self.active == 0).sum())
        return {**means, "l0": int(self.active.sum()) / self.tokens, "dead": dead, "found": found}


class Explained:
    """R2: 1 - sum of squared errors over sum of squared deviations from the mean, over all dimensions."""

    def __init__(self) -> None:
        self.errors = self.squares = 0.0
        self.sum: Tensor | float = 0.0
        self.tokens = 0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """One batch, both [B, d]."""
        x, x_hat = x.double(), x_hat.double()
        self.errors += float((x - x_hat).square().sum())
        self.squares += float(x.square().sum())
        self.sum = self.sum + x.sum(0)
        self.tokens += len(x)

    def result(self) -> float:
        assert isinstance(self.sum, Tensor)
        return 1 - self.errors / (self.squares - float(self.sum.square().sum()) / self.tokens)


def of_decoder(decoder: Tensor, truth: Tensor) -> tuple[dict[str, float], Tensor]:
    """({"mcc", "uniqueness"}, which true feature each row stands for, int64 [F]).

    Uniqueness is the share of different ones among these.
    """
    cosine = cosines(decoder, truth).cpu()
    matches = cosine.argmax(1)
    return {"mcc": mean_correlation(cosine), "uniqueness": len(matches.unique()) / len(matches)}, matches


@torch.no_grad()
def of_codes(
    sae: SampledSAE, batches: Iterable[Batch], matches: Tensor, absorption: Absorption | None = None
) -> dict[str, float | None]:
    """What `Detection` counts, `r2`, and what `absorption` finds, of an SAE in evaluation mode."""
    detection, explained = Detection(matches), Explained()
    for x, firing in batches:
        codes = sae.encode_sparse(x.to(sae.W_enc))
        detection.add(codes, firing)
        explained.add(x, sae.decode(codes).cpu())
        if absorption is not None:
            absorption.add(codes, firing)
    absorbed = {} if absorption is None else absorption.result()
    return {**detection.result(), "r2": explained.result(), **absorbed}
