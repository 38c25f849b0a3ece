"""Where a training starts, as far as that comes from data: docs/method.md, "Start"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codes import SparseCodes
from .interface import Implementation
from .layout import Leaves

CHUNK_FEATURES = 2048
# of Weiszfeld's iteration
ITERATIONS, TOLERANCE = 100, 1e-6


@torch.no_grad()
def start_from_targets(
    parts: Implementation, layer: Leaves, x: Tensor, target: Tensor, encode: Callable[[], SparseCodes]
) -> None:
    """Sets b_dec, the decoder rows and the length of the encoder's from tokens x [B, d_in] and targets [B, d_out].

    A row points to where the targets are on which its feature is active, weighted by its activation. The encoder is
    multiplied by the number with which what `encode` keeps of x, by the training's rule, reconstructs the targets best.
    """
    dtype, totals = torch.promote_types(x.dtype, torch.float32), parts.totals
    layer.b_out.copy_(geometric_median(target, total=totals.sum_of_tokens, greatest=totals.max_of_tokens))
    x, missing = x.to(dtype), target.to(dtype) - layer.b_out.to(dtype)
    for rows, W, b in zip(*(t.split(CHUNK_FEATURES) for t in (layer.W_dec, layer.W_enc, layer.b_enc))):
        found = totals.sum_of_tokens((torch.relu(x @ W.to(dtype).t() + b.to(dtype)).t() @ missing)[None])
        norms = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        # a feature that is active nowhere keeps the row that was drawn
        rows.copy_(torch.where(norms > 0, found / norms.clamp_min(torch.finfo(dtype).tiny), rows.to(dtype)))
    x_hat = parts.decode(encode(), layer.W_dec, None).to(dtype)
    size, along = totals.sum_of_tokens(torch.stack((x_hat.square(), x_hat * missing), 2).sum(1))
    best = along / torch.where(size > 0, size, 1)
    if best > 0:
        layer.W_enc.mul_(best)
        layer.b_enc.mul_(best)


def geometric_median(
    x: Tensor,
    total: Callable[[Tensor], Tensor] = lambda t: t.sum(0),
    greatest: Callable[[Tensor], Tensor] = torch.amax,
) -> Tensor:
    """The point of least summed distance to the rows of x [B, d], [d], by Weiszfeld's iteration.

    Unlike the mean it is not carried off by a few outlying tokens. Stops when a step is below TOLERANCE
    times the point's distance scale.

    Args:
        total, greatest: the sum over tokens of [B, ...], the largest of [B]; of all processes where there are several.
    """
    x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    n_tokens = total(x.new_ones(len(x)))
    point = total(x) / n_tokens
    for _ in range(ITERATIONS):
        distance = torch.linalg.vector_norm(x - point, dim=1)
        weight = 1 / distance.clamp_min(torch.finfo(x.dtype).eps * (1 + greatest(distance)))
        moved = total(weight[:, None] * x) / total(weight)
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if step <= TOLERANCE * total(distance) / n_tokens:
            break
    return point
