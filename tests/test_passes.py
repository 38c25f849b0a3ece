"""What a step reads and writes of [B, d] around its products: passes counted, values and gradients as before."""

import math

import pytest
import torch
from makers import tokens

pytest.importorskip("triton")

from benchmarks.costs import work_of_launch
from benchmarks.model import Trace
from benchmarks.replaced import replaced
from sampled_sae.impl.torch.reconstruction import errors_of_tokens
from sampled_sae.impl.torch.reconstruction import squared_errors as errors_of_torch
from sampled_sae.impl.triton.products import lowered
from sampled_sae.impl.triton.reconstruction import squared_errors as fused_errors
from sampled_sae.support.late_values import all_finite, squares_finite

B, D = 64, 32


def passes(call):
    """(what the call returns, how often its operations read or write [B, D] float32)."""
    with Trace() as trace:
        out = call()
    return out, sum(work.bytes for work in trace.works) // (4 * B * D)


def test_squared_errors_in_six_passes_and_six_back():
    x, x_hat = tokens(B, D, dtype=torch.float32), tokens(B, D, dtype=torch.float32, seed=2).requires_grad_()
    errors, forward = passes(lambda: errors_of_tokens(x, x_hat))
    (gradient,), backward = passes(lambda: torch.autograd.grad(errors.mean(), x_hat))
    assert (forward, backward) == (6, 6)
    expected = (x - x_hat).square().sum(-1)
    assert torch.equal(errors, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.mean(), x_hat)[0])


def test_the_operator_reads_twice_and_writes_once_in_each_direction():
    raw, bias, x = (torch.empty(*shape, device="meta") for shape in ((B, D), (D,), (B, D)))
    works = []
    with replaced(launch=lambda *args, **constexprs: works.append(work_of_launch(*args, **constexprs))):
        (_, errors), forward = passes(lambda: fused_errors(raw.requires_grad_(), bias.requires_grad_(), x))
        moved = [sum(work.bytes for work in works) // (4 * B * D)]
        _, backward = passes(lambda: torch.autograd.grad(errors.mean(), (raw, bias)))
        moved.append(sum(work.bytes for work in works) // (4 * B * D) - moved[0])
    assert moved == [3, 3]
    assert (forward, backward) == (0, 0), "passes of PyTorch beside the kernels"


def test_products_of_16_bits_take_the_gradient_as_it_was_rounded():
    """Once: by the operator; one that was changed since, or a copy, is rounded anew."""
    raw = tokens(5, D, dtype=torch.float32).requires_grad_()
    received = []
    with_hook = raw * 1
    with_hook.register_hook(received.append)
    _, errors = fused_errors(with_hook, None, tokens(5, D, dtype=torch.float32, seed=2), True)
    errors.sum().backward()
    (gradient,) = received
    low, factor = lowered(gradient, torch.bfloat16)
    assert factor is None
    assert low is gradient.rounded.copy
    assert torch.equal(low, gradient.bfloat16())
    assert torch.equal(lowered(gradient, torch.float16)[0].float(), lowered(gradient.clone(), torch.float16)[0].float())
    gradient.mul_(3)
    assert torch.equal(lowered(gradient, torch.bfloat16)[0], gradient.bfloat16())
    assert lowered(gradient.clone(), torch.bfloat16)[0] is not low


@pytest.mark.gpu
def test_the_operator_has_every_gradient():
    """Of a loss on the reconstruction too, and of the target."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = [
        tokens(*shape, dtype=torch.float32, seed=3).to(device).requires_grad_() for shape in ((5, D), (D,), (5, D))
    ]
    for form in (lambda x_hat, errors: errors.sum(), lambda x_hat, errors: x_hat.sin().sum() + errors.square().sum()):
        raw, bias, x = leaves
        expected = torch.autograd.grad(form(raw + bias, errors_of_tokens(x, raw + bias)), leaves)
        for ours, theirs in zip(torch.autograd.grad(form(*fused_errors(*leaves)), leaves), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for round_back in (False, True):
        torch.library.opcheck(fused_errors, (*(leaf.detach().requires_grad_() for leaf in leaves), round_back))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_torch_form_is_the_same_to_the_bit(dtype, with_bias):
    """Of a target of any dtype; gradients of the errors, of the reconstruction, and of both."""
    raw, target = tokens(5, D, dtype=torch.float32, seed=3), tokens(5, D, dtype=dtype)
    bias = tokens(D, dtype=dtype, seed=4).requires_grad_() if with_bias else None
    leaves = [raw.requires_grad_(), target.requires_grad_(), *([bias] if with_bias else [])]

    def plain(raw, bias, target):
        x_hat = raw if bias is None else raw + bias.to(raw.dtype)
        return x_hat, errors_of_tokens(target, x_hat)

    for form in (
        lambda x_hat, errors: errors.sum(),
        lambda x_hat, errors: x_hat.sin().sum(),
        lambda x_hat, errors: x_hat.sin().sum() + errors.square().sum(),
    ):
        ours, theirs = errors_of_torch(raw, bias, target), plain(raw, bias, target)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs))
        pair = [torch.autograd.grad(form(*found), leaves, allow_unused=True) for found in (ours, theirs)]
        for one, other in zip(*pair):
            assert (one is None) == (other is None)
            tolerance = 0 if one is None else 1e-2 if one.dtype == torch.bfloat16 else 1e-5
            assert one is None or torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance) is None


def test_squared_errors_have_both_derivatives():
    x, x_hat = tokens(3, 4), tokens(3, 4, seed=2)
    assert torch.autograd.gradcheck(errors_of_tokens, (x.requires_grad_(), x_hat.requires_grad_()))
    assert torch.autograd.gradgradcheck(errors_of_tokens, (x, x_hat))


def test_a_token_that_is_met_exactly_has_no_gradient():
    x_hat = torch.ones(2, 3, requires_grad=True)
    errors_of_tokens(torch.tensor([[1.0, 1, 1], [1, 1, 3]]), x_hat).sum().backward()
    assert x_hat.grad.tolist() == [[0, 0, 0], [0, 0, -4]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_not_finite_is_seen(dtype, bad):
    x = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    x[3, 4] = bad
    assert not all_finite(x)
    x[1, 2] = -bad
    assert not all_finite(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_has_no_finite_squares_is_seen(dtype, bad):
    # float16's largest is no danger to a sum in float32
    x = torch.full((5, 7), torch.finfo(dtype).max if dtype == torch.float16 else 3.0, dtype=dtype)
    assert squares_finite(x)
    for value in (bad, torch.finfo(dtype).max):
        x[3, 4] = value
        assert squares_finite(x) == (dtype == torch.float16 and math.isfinite(value))


@pytest.mark.parametrize("check", [all_finite, squares_finite])
def test_the_check_is_one_pass(check):
    x = tokens(B, D, dtype=torch.float32)
    assert passes(lambda: check(x))[1] == 1
