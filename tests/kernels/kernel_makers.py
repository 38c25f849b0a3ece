"""Inputs, expected values and ways to run that the tests of several kernels share."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from forked import run_forked

from sampled_sae.kernels.arguments import Spread

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


def run_program(program):
    exec(program, {})
    return 0


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
# the beginning of such programs
FAR = """
import torch
far = torch.empty_strided((3, 8), (2**30 + 16, 1), dtype=torch.float16)  # untouched pages cost nothing
far.copy_(torch.arange(24).reshape(3, 8))
near = far.clone(memory_format=torch.contiguous_format)
"""
# [B, d, F] of searches and their repair; the interpreter's tiles are 32 features x 32 tokens x 16 dimensions
SEARCH_SHAPES = [
    pytest.param((1, 1, 1), id="one of each"),
    pytest.param((32, 16, 32), id="one tile"),
    pytest.param((45, 19, 133), id="tails"),
    pytest.param((1, 5, 300), id="one token"),
    pytest.param((300, 5, 1), id="one feature"),
]


def assert_runs_alone(program, folder):
    """In a process of its own: an offset that wraps around ends it."""
    status, said = run_forked(folder / "log", run_program, program)
    assert status == 0, said[-2000:]


@contextmanager
def counted_stores():
    """A list that gets an element for every store that a kernel makes in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, made = InterpreterBuilder.create_masked_store, []

    def store(*args, **kwargs):
        made.append(None)
        return plain(*args, **kwargs)

    with patch.object(InterpreterBuilder, "create_masked_store", store):
        yield made


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
