"""The parts of dictionary_learning's training step, and what it does otherwise than `SampledSAE` and `RowAdam`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...impl.dead_features import AuxRule
from ...impl.encoder import Encoder
from ...impl.hints import Rule
from ...impl.interface import Implementation
from ...impl.pool import Pool
from ...sae import SampledSAE

# rows of the decoder's gradient that are projected at a time: what a CPU holds in its cache
PROJECTED_ELEMENTS = 1 << 19


class StepInputs(NamedTuple):
    """What a step works with: the encoder of its batch, the pool, and whether it only logs and so moves nothing."""

    parts: Implementation
    encoder: Encoder
    pool: Pool | None
    logging: bool


class LossLog(NamedTuple):
    """What dictionary_learning's logging asks of a batch."""

    x: Tensor
    x_hat: Tensor
    f: Tensor
    losses: dict[str, float]


@torch.no_grad()
def project_decoder_rows(sae: SampledSAE) -> None:
    """Removes from the gradient rows of W_dec what is parallel to W_dec's own, before the norm is clipped.

    RowAdam does so after clipping; the norm of what is left is what dictionary_learning clips.
    """
    on_cpu = sae.W_dec.device.type == "cpu"
    for part in sae.row_grads:
        if part.name != "W_dec" or part.rows.grad is None:
            continue
        size = max(1, PROJECTED_ELEMENTS // sae.cfg.d_in) if on_cpu else len(part.features)
        for features, grad in zip(part.features.split(size), part.rows.grad.split(size)):
            # of unit norm but for rounding, unless someone has written to the decoder
            W = torch.nn.functional.normalize(sae.W_dec.index_select(0, features).to(grad.dtype), dim=1)
            grad.sub_((grad * W).sum(1, keepdim=True) * W)


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


def mean_smallest_of_tokens(codes: SparseCodes) -> Tensor:
    """Mean over the tokens that keep something of the smallest activation kept, 0-dim."""
    if codes.block is not None:
        block = codes.block.detach()
        smallest = torch.where(block > 0, block, torch.inf).amin(1)
    else:
        listed = codes.entries() if codes.padded is None else codes.padded
        values, tokens = listed[0].detach(), listed[1].long()
        unused = values.new_full((codes.shape[0] + 1,), torch.inf)
        smallest = unused.scatter_reduce(0, tokens, torch.where(values > 0, values, torch.inf), "amin")[:-1]
    some = smallest < torch.inf
    return torch.where(some, smallest, 0).sum() / some.sum().clamp_min(1)


@torch.no_grad()
def average_threshold(sae: SampledSAE, smallest: Tensor, decay: float) -> None:
    """One step of a running mean that starts at its first value; `smallest` is 0-dim, inf where nothing was kept."""
    smallest = torch.where(smallest < torch.inf, smallest, 0).to(sae.threshold.dtype)
    moved = decay * sae.threshold + (1 - decay) * smallest
    sae.threshold.copy_(torch.where(sae.threshold < 0, smallest, moved))
    sae.threshold_steps.add_(1)
