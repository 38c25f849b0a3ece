"""dictionary_learning's loss for dead features, on the parts of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...impl.dead_features import AuxRule
from ...impl.hints import Rule
from ...sae import SampledSAE
from .step import StepInputs


def unexplained(sae: SampledSAE, inputs: StepInputs, residual: Tensor, dead: Tensor, k_aux: int) -> Tensor | None:
    """Mean squared error of the residual [B, d] from the k_aux largest activations a token of dead features, 0-dim.

    None where no feature can be used. As in dictionary_learning, and other than in `SampledSAE`, b_dec receives its
    gradient too. dead: bool [F].
    """
    rule = AuxRule(k_aux, sae.cfg.aux_pool, sae.cfg.score)
    scores = None if inputs.pool is None else inputs.pool.scores
    members = inputs.parts.dead_candidates(inputs.encoder.operands, dead, rule, scores)
    if len(members) == 0:
        return None
    hints = None if inputs.logging else sae.memory.hints
    codes = inputs.parts.select(inputs.encoder, members, Rule(max(1, min(k_aux, len(members))), "token"), hints)
    e_hat = inputs.parts.decode(codes, sae.W_dec, None, inputs.encoder.rows)
    return (residual - e_hat).square().sum(-1).mean()


def share_of_variance(missed: Tensor, residual: Tensor) -> Tensor:
    """`missed` by the variance of the residual [B, d]; 0 where that is 0."""
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    return torch.where(variance > 0, missed / torch.where(variance > 0, variance, 1), 0)
