"""Inputs of the selection kernels."""

import torch


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
