"""Drawing a candidate pool in proportion to the scores: Gumbel top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.cuda_graphs import capturing


def gumbel_keys(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """float64 [F], whose largest are a draw without replacement in proportion to the scores."""
    device = None if generator is None else generator.device
    u = torch.rand(scores.shape, dtype=torch.float64, generator=generator, device=device)
    if scores.device != u.device:
        if capturing():
            raise RuntimeError('pool="sample": every replay of a CUDA graph would draw the same pool; must be "top"')
        u = u.pin_memory().to(scores.device, non_blocking=True) if scores.is_cuda else u.to(scores.device)
    return scores.double().log() - (-u.log()).log()
