"""The dead-feature loss of docs/method.md, step 6, in sizes that do not depend on how many features are dead.

The candidates are always `aux_pool` features: the dead ones of highest score and, where fewer are dead, live ones
whose activations are put out by a bias of -inf. One dense product, one selection per token, one dense product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...reference import residual_variance
from ..dead_features import AuxRule, ranked, residual_of, settled_ranks
from ..encoder import Encoder, Operands
from ..hints import Rule
from ..torch import aux_loss as torch_form
from ..torch.layer import encoder as torch_encoder
from .block import block_codes
from .layer import decode
from .pool import top_pool
from .scores import column_scores
from .screen_columns import BoundsOnDevice, column_bounds

dead_candidates = functools.partial(torch_form.dead_candidates, score=column_scores)


def aux_loss(
    encoder: Encoder,
    x_hat: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    rule: AuxRule,
    scores: Tensor | BoundsOnDevice | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """As the torch form's, which serves for aux_pool=None, where the number of dead features has to be known."""
    if rule.aux_pool is None:
        return torch_form.aux_loss(torch_encoder(*encoder[:-1], screen="off"), x_hat, W_dec, dead, rule, None, target)
    residual, target = residual_of(encoder, x_hat, target)
    members = dead_pool(encoder.operands, dead, min(rule.aux_pool, encoder.shape[1]), rule.score, scores)
    masked = torch.where(dead, encoder.b, -torch.inf)
    codes = block_codes(encoder.weights_alone(), members, Rule(rule.k_aux, "token"), masked)
    e_hat = decode(codes, W_dec, None, encoder.rows)
    denominator = residual_variance(residual, target)
    defined = dead.any() & (denominator > 0)
    share = (residual - e_hat).square().sum(-1).mean() / torch.where(defined, denominator, 1)
    return torch.where(defined, share, 0)


def dead_pool(
    operands: Operands, dead: Tensor, size: int, score: str, scores: Tensor | BoundsOnDevice | None
) -> Tensor:
    """int64 [size], ascending: the dead features of highest score, and live ones where fewer are dead."""
    if size == operands.n_features:
        return torch.arange(size, device=dead.device)
    if scores is None:
        bounds = column_bounds(operands, score)
        scores = column_scores(operands, score) if bounds is None else bounds
    return top_pool(ranked(scores, dead) if isinstance(scores, Tensor) else settled_ranks(scores, dead, size), size)
