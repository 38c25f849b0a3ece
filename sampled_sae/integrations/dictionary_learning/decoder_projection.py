"""What dictionary_learning does to the decoder's gradient before it clips."""

from __future__ import annotations

import torch

from ...sae import SampledSAE

CHUNK_ELEMENTS = 1 << 19


@torch.no_grad()
def project_decoder_rows(sae: SampledSAE) -> None:
    """Removes from the gradient rows of W_dec what is parallel to W_dec's own, before the norm is clipped.

    RowAdam does so after clipping; the norm of what is left is what dictionary_learning clips.
    """
    for part in sae.row_grads:
        if part.name != "W_dec" or part.rows.grad is None:
            continue
        on_cpu = sae.W_dec.device.type == "cpu"
        size = max(1, CHUNK_ELEMENTS // sae.cfg.d_in) if on_cpu else max(1, len(part.features))
        for features, grad in zip(part.features.split(size), part.rows.grad.split(size)):
            W = sae.W_dec.index_select(0, features).to(grad.dtype)
            grad.sub_((grad * W).sum(1, keepdim=True) * W)
