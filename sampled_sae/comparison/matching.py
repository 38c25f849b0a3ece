"""Pairs of features of two SAEs, by the cosine of their decoder rows."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..inference.products import unit_rows
from ..support.argument_checks import check_choice, check_finite, describe
from ..support.timing import check_memory

METHODS = ("auto", "hungarian", "greedy")
# of features that "auto" gives to the Hungarian method: ten seconds and half a gigabyte for 8,192 by 8,192
MOST_PAIRS = 1 << 26
# nearest features that the greedy method chooses among
CANDIDATES = 32
# equal rows have a cosine of 1 up to it
ROUNDING = 1e-6
_BLOCK_BYTES = 1 << 27


@dataclass(frozen=True)
class Matching:
    """One to one, as many pairs as there are.

    Attributes:
        a, b: int64 [m], the features of each pair, ascending in a.
        cosine: float32 [m], of their decoder rows.
        nearest_a: float32 [F_a], the greatest cosine of each feature of A with any of B; nearest_b [F_b] likewise.
        how: the method, and why it was taken, in words.
    """

    a: Tensor
    b: Tensor
    cosine: Tensor
    nearest_a: Tensor
    nearest_b: Tensor
    how: str

    def shared(self, same: float) -> Tensor:
        """bool [m]: the pairs whose cosine is at least `same`, but for the rounding of a float32 product."""
        return self.cosine >= same - ROUNDING


@torch.no_grad()
def match_features(rows_a: Tensor, rows_b: Tensor, method: str = "auto") -> Matching:
    """Matches decoder rows [F_a, d] with [F_b, d].

    "hungarian" finds the matching of greatest total cosine, `scipy.optimize.linear_sum_assignment(cosines,
    maximize=True)`. "greedy" takes pair after pair by descending cosine, ties to the lower features, among the 32
    nearest features of each; a feature whose nearest are all taken stays alone. "auto" is "hungarian" where scipy
    (extra "compare") is installed and there are at most 2^26 pairs to choose from. A row of zeros has cosine 0.

    Raises:
        ValueError: rows of other widths, NaN or inf in them, another method.
        ImportError: method="hungarian" without scipy.
        MemoryError: method="hungarian" for more pairs than fit.
    """
    check_choice("method", method, METHODS)
    for name, rows in (("rows_a", rows_a), ("rows_b", rows_b)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.numel() == 0 or not rows.is_floating_point():
            raise ValueError(f"{name}={describe(rows)}: must be a floating tensor [F, d]")
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(f"rows_b={describe(rows_b)}: must be as wide as rows_a, {rows_a.shape[1]}")
    for name, rows in (("rows_a", rows_a), ("rows_b", rows_b)):
        check_finite(rows, name)
    a, b = (unit_rows(rows.detach().cpu()) for rows in (rows_a, rows_b))
    chosen, why = _method(method, len(a), len(b))
    if chosen == "hungarian":
        return _hungarian(a, b)
    return _greedy(a, b, why)


def _method(method: str, n_a: int, n_b: int) -> tuple[str, str]:
    """The method, and of a greedy one that was not asked for the reason."""
    there = importlib.util.find_spec("scipy") is not None
    if method == "hungarian":
        if not there:
            raise ImportError('method="hungarian" needs scipy: pip install "sampled-sae[compare]"')
        check_memory('method="hungarian"', 16 * n_a * n_b)
    if method != "auto":
        return method, ""
    if n_a * n_b > MOST_PAIRS:
        return "greedy", f", for {n_a} by {n_b} features are many for the Hungarian method"
    if not there:
        return "greedy", ', for scipy is not installed: pip install "sampled-sae[compare]"'
    return "hungarian", ""


def _hungarian(a: Tensor, b: Tensor) -> Matching:
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.t()
    found_a, found_b = (torch.from_numpy(side) for side in linear_sum_assignment(cosines.numpy(), maximize=True))
    how = "Hungarian method (scipy.optimize.linear_sum_assignment)"
    return Matching(found_a, found_b, cosines[found_a, found_b], cosines.amax(1), cosines.amax(0), how)


def _greedy(a: Tensor, b: Tensor, why: str) -> Matching:
    of_a, of_b = _nearest(a, b)
    edges = torch.cat(
        (
            torch.stack((torch.arange(len(a)).repeat_interleave(of_a.indices.shape[1]), of_a.indices.flatten())),
            torch.stack((of_b.indices.flatten(), torch.arange(len(b)).repeat_interleave(of_b.indices.shape[1]))),
        ),
        dim=1,
    )
    weights = torch.cat((of_a.values.flatten(), of_b.values.flatten()))
    # the same pair may be there from both sides; its cosine too, but for rounding
    order = np.lexsort((edges[1].numpy(), edges[0].numpy(), -weights.numpy()))
    free_a, free_b = [True] * len(a), [True] * len(b)
    pairs = []
    for i, j, cosine in zip(edges[0][order].tolist(), edges[1][order].tolist(), weights[order].tolist()):
        if free_a[i] and free_b[j]:
            free_a[i] = free_b[j] = False
            pairs.append((i, j, cosine))
    pairs.sort()
    found_a, found_b, cosines = zip(*pairs)
    how = f"greedy among the {CANDIDATES} nearest of each feature{why}"
    return Matching(
        torch.tensor(found_a), torch.tensor(found_b), torch.tensor(cosines), of_a.values[:, 0], of_b.values[:, 0], how
    )


def _nearest(a: Tensor, b: Tensor) -> tuple[torch.return_types.topk, torch.return_types.topk]:
    """The nearest rows of b of each row of a, and of a of each row of b, without the whole matrix of cosines."""
    of_a, of_b, start = [], None, 0
    for part in a.split(max(1, _BLOCK_BYTES // (4 * len(b)))):
        cosines = part @ b.t()
        of_a.append(cosines.topk(min(CANDIDATES, len(b)), dim=1))
        here = cosines.t().topk(min(CANDIDATES, len(part)), dim=1)
        values, indices = here.values, here.indices + start
        if of_b is not None:
            values, indices = torch.cat((of_b[0], values), 1), torch.cat((of_b[1], indices), 1)
            best = values.topk(min(CANDIDATES, values.shape[1]), dim=1)
            values, indices = best.values, indices.gather(1, best.indices)
        of_b, start = (values, indices), start + len(part)
    assert of_b is not None
    merged_a = torch.return_types.topk((torch.cat([t.values for t in of_a]), torch.cat([t.indices for t in of_a])))
    return merged_a, torch.return_types.topk(of_b)
