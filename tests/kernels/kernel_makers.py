"""Inputs, expected values and ways to run that the tests of several kernels share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EPS = torch.finfo(torch.float32).eps
NEEDS_VIRTUAL_MEMORY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for the interpreter: virtual memory is free there"
)


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


def integers(shape, dtype, device, seed=0):
    """x, W, b, scale in small whole numbers: activations are exact, and ties abound."""
    B, d, F = shape
    make = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randint(-2, 3, s, generator=make) for s in ((B, d), (F, d), (F,)))
    scale = torch.randint(1, 3, (F,), generator=make)
    return x.to(device, dtype), W.to(device, dtype), b.float().to(device), scale.float().to(device)


def matrix(rows, d, dtype, device, seed=1):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def statistics(a, score):
    """The sums of a's columns that a score is made of, [S, F]."""
    if score == "entropy":
        return torch.stack([a.sum(0), torch.xlogy(a, a).sum(0)])
    if score == "uniform":
        return (a > 0).sum(0, keepdim=True).to(a.dtype)
    return a.square().sum(0, keepdim=True)


def assert_within_rounding(found, expected, magnitude):
    """fp32 rounding: 4 EPS of the sum of the magnitudes of the terms."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    excess = (found.double() - expected).abs() - 4 * EPS * magnitude
    assert (excess <= 0).all(), f"error beyond fp32 rounding by {excess.max():.3g}"


def assert_runs_alone(program):
    """In a process of its own: an offset that wraps around ends it."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
