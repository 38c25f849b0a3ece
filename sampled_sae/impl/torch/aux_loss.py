"""The dead-feature loss of docs/method.md, step 6 (arXiv 2406.04093, appendix A.2), without a [B, F] tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...reference import residual_variance
from ..column_bounds import ColumnBounds, largest_columns
from ..dead_features import AuxRule, residual_of
from ..encoder import Encoder, Operands
from ..hints import Rule
from .entries import entry_codes
from .layer import decode
from .pool import candidate_pool
from .products import without_autocast
from .scores import column_scores
from .stream import stream_token


@without_autocast
def aux_loss(
    encoder: Encoder,
    x_hat: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    rule: AuxRule,
    scores: Tensor | ColumnBounds | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The share of the residual's variance that the dead features leave unexplained.

    Args:
        encoder: gradient reaches its W and b alone; its scale serves the scores, not the activations.
        x_hat: [B, d]; no gradient flows into it.
        W_dec: [F, d]; receives gradient.
        dead: bool [F].
        scores: [F], of this batch, or their bounds, where the pool needed them.
        target: [B, d], what x_hat reconstructs; the encoder's x where it is not given.

    Returns:
        mean ||e - e_hat||^2 / mean ||e - mean(e)||^2 with e = target - x_hat, 0-dim; 0 with no dead feature or where
        rounding alone explains the denominator.
    """
    residual, target = residual_of(encoder, x_hat, target)
    denominator = residual_variance(residual, target)
    members = dead_candidates(encoder.operands, dead, rule, scores)
    if len(members) == 0 or denominator == 0:
        return residual.new_zeros(())
    x, W, b, _, _, rows, operands = alone = encoder.weights_alone()
    if rule.aux_pool is not None:
        taken = rows.gather("W_enc", W, members, x.dtype)
        b_taken = rows.gather("b_enc", b, members, x.dtype)
        a = torch.addmm(b_taken, x, taken.t())
        block = torch.where(Rule(rule.k_aux, "token").mask(a.detach()), a, 0)
        codes = SparseCodes.from_block(block, members, operands.n_features)
    else:
        codes = entry_codes(alone, stream_token(operands.among(members), min(rule.k_aux, len(members))))
    e_hat = decode(codes, W_dec, None, rows)
    return (residual - e_hat).square().sum(-1).mean() / denominator


def dead_candidates(
    operands: Operands,
    dead: Tensor,
    rule: AuxRule,
    scores: Tensor | ColumnBounds | None = None,
    score: Callable[[Operands, str], Tensor] = column_scores,
) -> Tensor:
    """int64, ascending: the dead features, of dead bool [F]; of more than `aux_pool` those of highest column score.

    scores: [F], or their bounds, where they are known; else `score` finds those of the dead features.
    """
    members = dead.nonzero().squeeze(1)
    if rule.aux_pool is None or len(members) <= rule.aux_pool:
        return members

    if isinstance(scores, ColumnBounds):
        found = largest_columns(scores.of_features(members), rule.aux_pool)
        if found is not None:
            return members[found]
        dead_scores = scores.exact(members)
    elif scores is None:
        dead_scores = score(operands.of_features(members), rule.score)
    else:
        dead_scores = scores[members]
    return members[candidate_pool(dead_scores, rule.aux_pool)]
