"""Where the training of a transcoder starts: docs/method.md, "Start"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..support.geometric_median import geometric_median
from .layout import Layer

CHUNK_FEATURES, CHUNK_ENTRIES = 2048, 1 << 15


@torch.no_grad()
def start_from_targets(layer: Layer, x: Tensor, target: Tensor, encode: Callable[[], SparseCodes]) -> None:
    """Sets b_dec, the decoder rows and the length of the encoder's from tokens x [B, d_in] and targets [B, d_out].

    A row points to where the targets are on which its feature is active, weighted by its activation. The encoder is
    multiplied by the number with which what `encode` keeps of x, by the training's rule, reconstructs the targets best.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    layer.b_dec.copy_(geometric_median(target))
    x, missing = x.to(dtype), target.to(dtype) - layer.b_dec.to(dtype)
    for rows, W, b in zip(*(t.split(CHUNK_FEATURES) for t in (layer.W_dec, layer.W_enc.t(), layer.b_enc))):
        found = torch.relu(x @ W.to(dtype).t() + b.to(dtype)).t() @ missing
        norms = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        # a feature that is active nowhere keeps the row that was drawn
        rows.copy_(torch.where(norms > 0, found / norms.clamp_min(torch.finfo(dtype).tiny), rows.to(dtype)))
    x_hat = torch.zeros_like(missing)
    for values, tokens, features in zip(*(t.split(CHUNK_ENTRIES) for t in encode().entries())):
        x_hat.index_add_(0, tokens, values.to(dtype)[:, None] * layer.W_dec[features].to(dtype))
    size = x_hat.square().sum()
    best = (x_hat * missing).sum() / torch.where(size > 0, size, 1)
    if best > 0:
        layer.W_enc.mul_(best)
        layer.b_enc.mul_(best)
