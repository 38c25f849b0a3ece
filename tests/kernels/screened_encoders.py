"""Encoders of the Triton form without and with a screen."""

import torch

from sampled_sae.codes import SparseCodes
from sampled_sae.impl.interface import implementation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = implementation("triton")


def triton_encoder(x, W, b, scale=None, screen="bf16"):
    x, W, b = x.to(DEVICE), W.to(DEVICE), b.to(DEVICE)
    scale = None if scale is None else scale.to(DEVICE)
    made = TRITON.encoder(x, W, b, None, scale, screen=screen)
    assert (made.operands.screen is None) == (screen == "off")
    return made


def both(*case):
    """The encoder without and with a screen."""
    return [triton_encoder(*case, screen=name) for name in ("off", "bf16")]


def on_cpu(codes):
    return SparseCodes(*(t.detach().cpu() for t in codes.entries()), codes.shape)


def drawn(B=16, d=12, F=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, d, generator=g), torch.randn(F, d, generator=g), 0.1 * torch.randn(F, generator=g)
