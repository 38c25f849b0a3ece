"""`compare`: what two SAEs share, in figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..inference.inference_sae import InferenceSAE
from ..support.argument_checks import check_number
from .agreement import Agreement, agreement, check_both_read
from .matching import Matching, match_features

# below it two features count as different
SAME = 0.7
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EDGES = [round(-1 + 0.05 * i, 2) for i in range(41)]


@dataclass(frozen=True)
class Comparison:
    """Of SAEs A and B.

    Attributes:
        matching: pairs of features.
        agreement: on shared activations; None without.
        same: the cosine from which a pair counts as shared.
        widths: d_sae of A and B.
    """

    matching: Matching
    agreement: Agreement | None
    same: float
    widths: tuple[int, int]

    def alone(self, side: int) -> np.ndarray[Any, np.dtype[Any]]:
        """The features of A (0) or B (1) without a partner of cosine `same` or more, ascending."""
        partner = (self.matching.a, self.matching.b)[side][self.matching.shared(self.same)].numpy()
        return np.setdiff1d(np.arange(self.widths[side]), partner)

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON; NaN where there is nothing to take a mean of."""
        m = self.matching
        cosine = m.cosine.double().numpy()
        shared = int(m.shared(self.same).sum())
        found: dict[str, Any] = {
            "features": list(self.widths),
            "matching": m.how,
            "pairs": len(cosine),
            "same": self.same,
            "shared": shared,
            "alone": [width - shared for width in self.widths],
            "cosine_mean": float(cosine.mean()),
            "cosine_quantiles": {f"{q:g}": float(np.quantile(cosine, q)) for q in QUANTILES},
            "nearest_cosine_mean": [float(m.nearest_a.double().mean()), float(m.nearest_b.double().mean())],
            "histogram_edges": EDGES,
            "cosine_histogram": np.histogram(cosine.clip(-1, 1), EDGES)[0].tolist(),
        }
        return found if self.agreement is None else {**found, "on_activations": self._on_activations(self.agreement)}

    def _on_activations(self, on: Agreement) -> dict[str, Any]:
        shared = self.matching.shared(self.same).numpy()
        sides = (on.active_a, on.active_b)
        alone = [self.alone(side) for side in (0, 1)]
        entries = [float(active[lone].sum() / max(1, active.sum())) for active, lone in zip(sides, alone)]
        return {
            "tokens": on.tokens,
            "l0": list(on.l0),
            "fvu": list(on.fvu),
            "active": [int((active > 0).sum()) for active in sides],
            "alone_active": [int((active[lone] > 0).sum()) for active, lone in zip(sides, alone)],
            "alone_share_of_entries": entries,
            "reconstruction_cosine": on.x_hat_cosine,
            "overlap": on.overlap,
            "jaccard_median": _median(on.jaccard[shared]),
            "activation_cosine_median": _median(on.activation_cosine[shared]),
        }


def compare(
    a: InferenceSAE,
    b: InferenceSAE,
    x: Tensor | None = None,
    *,
    method: str = "auto",
    same: float = SAME,
    batch_size: int = 2048,
) -> Comparison:
    """Matches the features of two SAEs one to one and, given activations, compares their codes.

    Args:
        a, b: as `load_inference` gives them; of the same width of decoder rows, with any number of features.
        x: [n, d_in] activations that both read.
        method: as in `match_features`.
        same: pairs of at least this cosine count as shared features, the others as different ones.
        batch_size: tokens encoded at a time.

    Raises:
        ValueError, ImportError, MemoryError: as `match_features` and `agreement`.
    """
    same = check_number("same", same, -1, 1)
    if x is not None:
        check_both_read(a, b, x)
    matching = match_features(a.W_dec, b.W_dec, method)
    on = None if x is None else agreement(a, b, x, matching, same=same, batch_size=batch_size)
    return Comparison(matching, on, same, (a.cfg.d_sae, b.cfg.d_sae))


def _median(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    found = values[~np.isnan(values)]
    return float(np.median(found)) if len(found) else float("nan")
