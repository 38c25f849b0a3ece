"""What each feature carries of the reconstruction: by how much the loss would rise without it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..inference.codes_store import CodesStore
from ..inference.inference_sae import InferenceSAE
from ..inference.products import decoder_norms
from ..training.activation_store import ActivationStore

BATCH = 4096
# share of the squares that rounding may leave of the variance of tokens that are all alike
ROUNDING = 1e-12


class LossShares(NamedTuple):
    """fvu: of the tokens. rise: float64 [F], by how much FVU rises where one feature alone is left out."""

    fvu: float
    rise: Tensor


def can_share(sae: InferenceSAE) -> bool:
    """Whether a code moves the reconstruction of every token alike, and the reconstruction is that of the input."""
    return not sae.cfg.is_transcoder and sae.cfg.normalize == "none"


def loss_shares(sae: InferenceSAE, store: ActivationStore, codes: CodesStore, n_shards: int) -> LossShares | None:
    """Over the first shards of activations and of their codes; None where all tokens are alike, which have no FVU.

    With e = x - x_hat and v_j what a code of 1 adds to x_hat, a token's squared error without c_j is
    ||e + c_j v_j||^2 = ||e||^2 + 2 c_j e v_j + c_j^2 ||v_j||^2. The gradient of the squared error in c_j is -2 e v_j.
    """
    lengths = torch.ones(codes.d_sae) if sae.cfg.scale_by_decoder_norm else decoder_norms(sae.W_dec)
    squares = (lengths.double() / sae.cfg.input_scale).square()
    rise, error = torch.zeros(codes.d_sae, dtype=torch.float64), 0.0
    total, total_squares, n = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0.0, 0
    for i in range(n_shards):
        x, (values, tokens, features) = store.shard(i), codes.codes(i).entries()
        ends = torch.searchsorted(tokens, torch.arange(0, len(x) + BATCH, BATCH).clamp(max=len(x))).tolist()
        for part, (start, end), first in zip(x.split(BATCH), pairwise(ends), range(0, len(x), BATCH)):
            c = values[start:end].float().requires_grad_()
            at = features[start:end]
            x_hat = sae.decode(SparseCodes(c, tokens[start:end] - first, at, (len(part), codes.d_sae)))
            squared = (part - x_hat).square().sum()
            (gradient,) = torch.autograd.grad(squared, c)
            with torch.no_grad():
                double = c.double()
                rise.index_add_(0, at, double.square() * squares[at] - double * gradient.double())
            error += float(squared.detach())
            total += part.double().sum(0)
            total_squares += float(part.double().square().sum())
            n += len(part)
    deviations = total_squares - float(total.square().sum()) / n
    if deviations <= ROUNDING * total_squares:
        return None
    return LossShares(error / deviations, rise / deviations)
