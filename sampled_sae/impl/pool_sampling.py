"""Drawing a candidate pool in proportion to the scores: Gumbel top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.cuda_graphs import capturing


def gumbel_keys(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """float64 [F], whose largest are a draw without replacement in proportion to the scores."""
    return keys_of(scores, gumbel_noise(scores, generator))


def keys_of(scores: Tensor, noise: Tensor | None) -> Tensor:
    """[F], whose largest are the pool: the scores, or with the noise of a draw, float64 [F], its keys."""
    return scores if noise is None else scores.double().log() + noise


def gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """-ln(-ln u) with u uniform: float64 in the shape and on the device of `like`."""
    device = None if generator is None else generator.device
    u = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=device)
    if like.device != u.device:
        if capturing():
            raise RuntimeError('pool="sample": every replay of a CUDA graph would draw the same pool; must be "top"')
        u = u.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else u.to(like.device)
    return -(-u.log()).log()
