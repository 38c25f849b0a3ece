"""Inputs of the selection kernels."""

import torch

from sampled_sae.kernels.arguments import Spread


def products(shape, device, levels=None, seed=0):
    """z, b, scale; with `levels` so few different activations that most are ties."""
    make = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=make)
    b = torch.randn(shape[1], generator=make) / 2
    scale = torch.rand(shape[1], generator=make) + 0.5
    if levels is not None:
        z = (z * levels).round() / levels
        b, scale = torch.zeros_like(b), torch.ones_like(scale)
    return z.to(device), b.to(device), scale.to(device)


def masked(a, k):
    """The k largest positive entries of each row, by a stable sort: ties to the lower column."""
    order = a.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(a).scatter_(1, order, 1) * (a > 0)
    return torch.where(kept > 0, a, 0.0)


def drawn_spread(shape, device, seed=3):
    """Of a chunk [B, C], in eighths, so that what it makes of products in quarters is exact."""
    make = torch.Generator().manual_seed(seed)
    lengths = [shape[0]] * 2 + [shape[1]] * 3
    return Spread(*((torch.randint(0, 3, (n,), generator=make) / 8).to(device) for n in lengths))


def spread_of(spread):
    """[B, C]: how far each entry may be off."""
    of_tokens = spread.norms[:, None] * spread.of_norms + spread.errors[:, None] * spread.of_errors
    return of_tokens + spread.of_bias
