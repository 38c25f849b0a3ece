"""The page of two SAEs side by side: figures, cosines of pairs, every pair, and what each SAE has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comparison.compare import EDGES, Comparison
from ..comparison.report import figures
from .html import packed, page, short
from .look_link import LookLink

COMPARISON_PAGE = "comparison.html"
SCRIPTS = ("common.js", "charts.js", "long_table.js", "comparison.js")
# of pairs, and of features alone, that a page has: five megabytes each; matches.csv has all
MOST_ROWS = 1 << 18
SHARES = [round(0.05 * i, 2) for i in range(21)]
# pairs of a bin of cosines without which it has no quartiles
FEWEST = 5
Numbers = np.ndarray[Any, np.dtype[Any]]


def comparison_page(
    found: Comparison,
    names: tuple[str, str],
    activations: str | None = None,
    looks: tuple[LookLink | None, LookLink | None] = (None, None),
) -> str:
    """The HTML.

    Args:
        found: the comparison.
        names: that A and B are shown under.
        activations: what the codes were compared on; None without.
        looks: where the page of each SAE is, to which its features link; None without.
    """
    summary, m = found.summary(), found.matching
    # the pairs of greatest cosine, ascending in A as they stand
    kept = m.cosine.sort(descending=True, stable=True).indices[:MOST_ROWS].sort().values
    sides = [m.a[kept], m.b[kept]]
    on = found.agreement
    actives = (None, None) if on is None else (on.active_a, on.active_b)
    pairs = {
        "features": [packed(side.int()) for side in sides],
        "cosine": packed(m.cosine[kept].float()),
        "shared": packed(m.shared(found.same)[kept].int()),
        "jaccard": None if on is None else packed(torch.from_numpy(on.jaccard)[kept].float()),
        "activation": None if on is None else packed(torch.from_numpy(on.activation_cosine)[kept].float()),
        "active": [None if n is None else packed(torch.from_numpy(n)[side].int()) for n, side in zip(actives, sides)],
        "total": len(m.cosine),
    }
    nearest = (m.nearest_a, m.nearest_b)
    data = {
        "name": " and ".join(names),
        "names": list(names),
        "about": {"matched by": summary["matching"], **({} if activations is None else {"activations": activations})},
        "same": found.same,
        "tokens": None if on is None else on.tokens,
        "figures": figures(summary),
        "edges": EDGES,
        "cosines": [_histogram(values.numpy(), EDGES) for values in (m.cosine, *nearest)],
        "on_activations": None if on is None else _on_activations(found),
        "pairs": pairs,
        "alone": [_alone(found.alone(side), nearest[side], actives[side]) for side in (0, 1)],
        "looks": [None if look is None else look.of_page() for look in looks],
    }
    return page(f"{names[0]} and {names[1]}", "comparison.html", SCRIPTS, data)


def _alone(features: Numbers, nearest: Tensor, active: Numbers | None) -> dict[str, Any]:
    kept = torch.from_numpy(features[:MOST_ROWS])
    return {
        "features": packed(kept.int()),
        "nearest": packed(nearest[kept].float()),
        "active": None if active is None else packed(torch.from_numpy(active)[kept].int()),
        "total": len(features),
    }


def _on_activations(found: Comparison) -> dict[str, Any]:
    """Of the pairs of features that fired: shares of tokens by cosine, and histograms of the shared ones."""
    on = found.agreement
    assert on is not None
    cosine, shared = found.matching.cosine.numpy(), found.matching.shared(found.same).numpy()
    bins = np.clip(np.digitize(cosine, EDGES) - 1, 0, len(EDGES) - 2)
    quartiles = []
    for i, centre in enumerate((np.array(EDGES[:-1]) + np.array(EDGES[1:])) / 2):
        own = on.jaccard[(bins == i) & ~np.isnan(on.jaccard)]
        if len(own) >= FEWEST:
            quartiles.append([short(float(value)) for value in (centre, *np.quantile(own, (0.25, 0.5, 0.75)))])
    return {
        "quartiles": quartiles,
        "edges": SHARES,
        "jaccard": _histogram(on.jaccard[shared], SHARES),
        "activation": _histogram(on.activation_cosine[shared], SHARES),
    }


def _histogram(values: Numbers, edges: list[float]) -> list[int]:
    """Of those that are numbers; what rounding has put beyond the edges is in the last bin."""
    return list(map(int, np.histogram(values[~np.isnan(values)].clip(edges[0], edges[-1]), edges)[0]))
