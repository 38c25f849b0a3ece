"""The dead-feature loss of tokens that are all but the same, where the residual's variance is rounding."""

import pytest
import torch
from makers import D, make_sae, tokens

from sampled_sae.reference import residual_variance

IMPLS = ("torch", "reference", "triton")


def aux_of(x, impl, dtype, **settings):
    sae = make_sae(dtype, impl=impl, aux_coefficient=1.0, dead_after=10, **settings)
    sae.tokens_since_active.fill_(10)
    out = sae(x)
    out.loss.backward()
    return float(out.aux.detach()), sae


@pytest.mark.parametrize(
    ("size", "copies", "impl"),
    [(size, n, impl) for size in (1e-3, 1.0, 3e4) for n in (1, 37, 64) for impl in IMPLS[:2]] + [(5.0, 16, "triton")],
)
def test_copies_of_one_token_have_nothing_to_explain(impl, size, copies):
    x = size * tokens(1, D, dtype=torch.float32).repeat(copies, 1)
    aux, sae = aux_of(x, impl, torch.float32)
    assert aux == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("settings", [{"aux_pool": None}, {"l": None}, {"l": None, "select": "token"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whatever_the_rule(settings, dtype):
    x = 5 * tokens(1, D, dtype=dtype).repeat(50, 1)
    assert aux_of(x, "torch", dtype, **settings)[0] == aux_of(x, "reference", dtype, **settings)[0] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_what_varies_is_explained(impl):
    x = tokens(1, D, dtype=torch.float32) + 1e-3 * tokens(16, D, dtype=torch.float32, seed=2)
    assert aux_of(x, impl, torch.float32)[0] > 0


def test_the_bound():
    x = torch.ones(2, 1, dtype=torch.float64)
    eps = torch.finfo(x.dtype).eps
    for steps, counts in ((60, False), (400, True)):
        residual = torch.tensor([[1.0], [1.0 + steps * eps]], dtype=x.dtype)
        assert bool(residual_variance(residual, x) > 0) == counts
    assert residual_variance(torch.zeros_like(x), x) == 0
    assert residual_variance(torch.tensor([[0.0], [1e-18]], dtype=x.dtype), x) == 0, "rounding of x alone"
