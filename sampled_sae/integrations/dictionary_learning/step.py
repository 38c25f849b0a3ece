"""The parts of dictionary_learning's training step, and what it does otherwise than `SampledSAE` and `RowAdam`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...impl.encoder import Encoder
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
