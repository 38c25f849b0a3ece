"""The dead-feature loss, step 6 of docs/method.md, over the tokens and features of all processes."""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor

from ..impl.column_bounds import ColumnBounds
from ..impl.dead_features import AuxRule, ranked, residual_of, settled_ranks
from ..impl.encoder import Encoder, Operands
from ..impl.hints import Rule
from .bounds_on_device import SpreadBounds
from .mesh import Mesh
from .parts import SpreadParts

Bounds = Union[ColumnBounds, SpreadBounds]  # noqa: UP007  (evaluated at import)


def aux_loss(
    parts: SpreadParts,
    encoder: Encoder,
    x_hat: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    rule: AuxRule,
    scores: Tensor | Bounds | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """As that of one process: impl/torch/aux_loss.py.

    x_hat: [B, d], of the tokens here. dead: bool [F], and scores: [F], of the features here.
    """
    mesh, operands = parts.mesh, encoder.operands
    residual, target = residual_of(encoder, x_hat, target)
    denominator = residual_variance(residual, target, operands.whole_shape[0], mesh)
    alone, k_aux, defined = encoder.weights_alone(), rule.k_aux, denominator > 0
    if parts.waits or rule.aux_pool is None:
        members = dead_candidates(parts, operands, dead, rule, scores)
        n_members = int(mesh.feature.sum_(torch.tensor(len(members), device=dead.device), "dead features"))
        if n_members == 0:
            return residual.new_zeros(())
        k_aux = min(k_aux, n_members)
    else:
        # as many as there may be, so that nothing waits for their number: others are put out by their bias
        members, dead = largest_dead(parts, operands, dead, rule, scores)
        alone = alone.only(dead)
        defined = defined & mesh.feature.max_(dead.any().to(torch.uint8), "dead features").bool()
    codes = parts.select(alone, members, Rule(k_aux, "token"))
    e_hat = parts.decode(codes, W_dec, None, encoder.rows)
    missed = parts.totals.mean((residual - e_hat).square().sum(-1), operands)
    return torch.where(defined, missed / torch.where(defined, denominator, 1), 0)


def residual_variance(residual: Tensor, x: Tensor, n_tokens: int, mesh: Mesh) -> Tensor:
    """As that of the reference, of the tokens of all processes: 0-dim."""
    d = residual.shape[1]
    sums = torch.cat((residual.sum(0), residual.square().sum()[None], x.square().sum()[None]))
    sums = mesh.data.sum_(sums, "residual") / n_tokens
    variance = mesh.data.sum_((residual - sums[:d]).square().sum(), "residual") / n_tokens
    return torch.where(variance > (64 * torch.finfo(residual.dtype).eps) ** 2 * sums[d:].sum(), variance, 0)


def dead_candidates(
    parts: SpreadParts, operands: Operands, dead: Tensor, rule: AuxRule, scores: Tensor | Bounds | None
) -> Tensor:
    """int64, ascending: of the dead features here those that take part."""
    members = dead.nonzero().squeeze(1)
    if rule.aux_pool is None:
        return members
    counts = parts.mesh.feature.gather(torch.tensor(len(members), device=dead.device), "dead features")
    if int(counts.sum()) <= rule.aux_pool:
        return members
    if isinstance(scores, ColumnBounds):
        found = parts.ranking.within(scores.of_features(members), rule.aux_pool, most_local=int(counts.max()))
        if found is not None:
            return members[found]
        of_members = scores.exact(members)
    elif isinstance(scores, Tensor):
        of_members = scores[members]
    else:
        of_members = parts.column_scores(operands.of_features(members), rule.score)
    return members[parts.ranking.largest(of_members, rule.aux_pool, int(counts.max()))]


def largest_dead(
    parts: SpreadParts, operands: Operands, dead: Tensor, rule: AuxRule, scores: Tensor | Bounds | None
) -> tuple[Tensor, Tensor]:
    """int64, ascending: as many features here, or all, as there may be dead ones among the `aux_pool` of highest score
    of all processes; and bool [F], which features are."""
    size = rule.aux_pool
    if size is None or size >= parts.weights.n_features:
        return torch.arange(len(dead), device=dead.device), dead
    if scores is None:
        bounds = parts.column_bounds(operands, rule.score)
        scores = parts.column_scores(operands.in_full(), rule.score) if bounds is None else bounds
    assert not isinstance(scores, ColumnBounds)
    keys = ranked(scores, dead) if isinstance(scores, Tensor) else settled_ranks(scores, dead, size)
    if parts.mesh.feature.size == 1:
        return parts.candidate_pool(keys, size), dead
    members, taken = parts.ranking.candidates(keys, size)
    return members, torch.zeros_like(dead).index_copy_(0, members, taken) & dead
