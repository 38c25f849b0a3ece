import pytest
import torch

pytest.importorskip("triton")

from sampled_sae.kernels.reconstruction import squared_errors, squared_errors_backward

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, d]; the interpreter takes 4 tokens and 16 of d at once, and two such tiles to a column's sum
SHAPES = [
    pytest.param((1, 1), id="one of each"),
    pytest.param((8, 16), id="one tile"),
    pytest.param((19, 37), id="tails"),
    pytest.param((5, 48), id="tiles of d"),
]


def scaled(shape, device):
    B, d = shape
    return (16 * B, 16 * d) if device == "cuda" else shape


def drawn(*shape, seed, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def problem(shape, device, dtype=torch.float32):
    """raw, bias, target."""
    B, d = scaled(shape, device)
    make = [((B, d), 1, torch.float32), ((d,), 2, torch.float32), ((B, d), 3, dtype)]
    return [drawn(*size, seed=seed, device=device, dtype=kind) for size, seed, kind in make]


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_and_reconstruction(shape, has_bias, dtype, device):
    raw, bias, target = problem(shape, device, dtype)
    given = raw.clone()
    x_hat, errors = squared_errors(raw, bias if has_bias else None, target)
    assert torch.equal(x_hat, raw + bias if has_bias else raw)
    assert torch.equal(raw, given), "raw is left as it is"
    close(errors, (x_hat.double() - target.double()).square().sum(1))


@pytest.mark.parametrize("received", ["errors", "x_hat", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, received, device):
    x_hat, _, target = problem(shape, device, torch.bfloat16 if received == "both" else torch.float32)
    d_errors = drawn(len(x_hat), seed=4, device=device) if received != "x_hat" else None
    d_x_hat = drawn(*x_hat.shape, seed=5, device=device) if received != "errors" else None
    leaf = x_hat.double().requires_grad_()
    errors = (leaf - target.double()).square().sum(1)
    parts = [(errors, d_errors), (leaf, d_x_hat)]
    (expected,) = torch.autograd.grad(sum((out * d.double()).sum() for out, d in parts if d is not None), leaf)
    d_raw, d_bias = squared_errors_backward(d_errors, d_x_hat, x_hat, target)
    close(d_raw, expected)
    torch.testing.assert_close(d_bias.double(), expected.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_copy_is_the_gradient_rounded(dtype, shape, device):
    x_hat, _, target = problem(shape, device)
    d_errors = drawn(len(x_hat), seed=4, device=device)
    alone = squared_errors_backward(d_errors, None, x_hat, target)
    copy = torch.empty(x_hat.shape, dtype=dtype, device=device)
    for found, expected in zip(squared_errors_backward(d_errors, None, x_hat, target, copy), alone):
        assert torch.equal(found, expected)
    assert torch.equal(copy, alone[0].to(dtype))


def test_reconstruction_of_strided_arguments(device):
    raw, bias, target = problem((11, 20), device)
    wide = [torch.cat((t, torch.full_like(t, torch.nan)), 1)[:, : t.shape[1]] for t in (raw, target)]
    assert not wide[0].is_contiguous()
    for found, expected in zip(squared_errors(wide[0], bias, wide[1]), squared_errors(raw, bias, target)):
        assert torch.equal(found, expected)
    turned = [t.t().contiguous().t() for t in (raw, target)]
    for found, expected in zip(squared_errors(turned[0], bias, turned[1]), squared_errors(raw, bias, target)):
        assert torch.equal(found, expected)
    d_errors = drawn(len(raw), seed=4, device=device)
    ours = squared_errors_backward(d_errors, wide[1], turned[0], wide[1])
    for found, expected in zip(ours, squared_errors_backward(d_errors, target, raw, target)):
        assert torch.equal(found, expected)


def test_a_bad_value_is_seen_in_its_token_alone(device):
    raw, bias, target = problem((9, 20), device)
    raw[4, 7], raw[6, 3] = torch.nan, torch.inf
    _, errors = squared_errors(raw, bias, target)
    assert errors[4].isnan()
    assert errors[6].isinf()
    assert errors.isfinite().sum() == len(raw) - 2


def test_without_tokens(device):
    raw, bias, target = (t[:0] if t.ndim == 2 else t for t in problem((3, 5), device))
    assert [t.shape for t in squared_errors(raw, bias, target)] == [raw.shape, raw.shape[:1]]
    d_raw, d_bias = squared_errors_backward(raw[:, 0], None, raw, target)
    assert d_raw.shape == raw.shape
    assert d_bias.tolist() == [0] * raw.shape[1]


def test_bad_arguments(device):
    raw, bias, target = problem((3, 5), device)
    with pytest.raises(ValueError, match="raw must be a matrix in fp32"):
        squared_errors(raw.bfloat16(), bias, target)
    with pytest.raises(ValueError, match=r"target must be \[.*\] as raw"):
        squared_errors(raw, bias, target[:, 1:])
    with pytest.raises(ValueError, match="target must be a matrix in fp32, bf16 or fp16"):
        squared_errors(raw, bias, target.double())
    with pytest.raises(ValueError, match="bias must be contiguous"):
        squared_errors(raw, bias[1:], target)
    with pytest.raises(ValueError, match="d_errors must be contiguous"):
        squared_errors_backward(bias[:1].expand(len(raw)).double(), None, raw, target)
    with pytest.raises(ValueError, match="d_x_hat must be a matrix in fp32"):
        squared_errors_backward(None, raw.half(), raw, target)
    with pytest.raises(ValueError, match="copy must be contiguous bf16 or fp16"):
        squared_errors_backward(None, raw, raw, target, raw.clone())
