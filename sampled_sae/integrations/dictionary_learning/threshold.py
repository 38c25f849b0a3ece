"""The running mean behind the threshold that inference uses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes import SparseCodes
from ...sae import SampledSAE


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
