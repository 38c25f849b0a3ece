"""The row-Adam kernel against torch.optim.Adam, SparseAdam and a loop over the rows."""

import math

import pytest
import torch

pytest.importorskip("triton")

from row_adam_steps import DECODER, MODES, RULE, gradients, ours, start

from sampled_sae.kernels.row_adam import row_adam_

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = torch.finfo(torch.float32).eps
# F, d, T; the interpreter holds 64 elements at once, at least one row
SHAPES = [
    pytest.param((67, None, 13), id="vector"),
    pytest.param((67, 1, 13), id="one column"),
    pytest.param((45, 3, 13), id="tails"),
    pytest.param((8, 16, 8), id="whole tiles, every row"),
    pytest.param((5, 576, 3), id="d=576"),
    pytest.param((5, 768, 3), id="d=768"),
]


def torch_adam(state, grads, dtype, project=False, renormalize=False, **rule):
    """The same with torch.optim.Adam on the dense gradient, in this dtype."""
    rule = RULE | rule
    weight = state[0].to(dtype, copy=True).requires_grad_()
    betas = (rule["beta1"], rule["beta2"])
    adam = torch.optim.Adam([weight], rule["lr"], betas, rule["eps"], weight_decay=rule["weight_decay"])
    for features, rows in grads:
        slope = torch.zeros_like(weight).index_copy(0, features, rows.to(dtype))
        if rule["factor"] is not None:
            slope = slope * rule["factor"].to(dtype)
        with torch.no_grad():
            weight.grad = slope - (slope * weight).sum(1, keepdim=True) * weight if project else slope
        adam.step()
        if renormalize:
            weight.data /= weight.data.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return weight.detach(), adam.state[weight]["exp_avg"], adam.state[weight]["exp_avg_sq"]


def row_by_row(state, grads, dtype, decayed, project=False, renormalize=False, **rule):
    """Modes "lazy" and "decayed" as a loop over the rows, in this dtype."""
    rule = RULE | rule
    weight, exp_avg, exp_avg_sq = (t.to(dtype, copy=True) for t in state[:3])
    last = state[3].clone()
    for step, (features, rows) in enumerate(grads, 1):
        for j, slope in zip(features.tolist(), rows.to(dtype)):
            if (slope == 0).all():
                continue
            missed = step - 1 - int(last[j]) if decayed else 0
            last[j] = step if decayed else 0
            w = weight[j]
            g = slope if rule["factor"] is None else slope * rule["factor"].to(dtype)
            g = g - (g * w).sum() * w if project else g
            g = g + rule["weight_decay"] * w
            exp_avg[j] = exp_avg[j] * rule["beta1"] ** (missed + 1) + (1 - rule["beta1"]) * g
            exp_avg_sq[j] = exp_avg_sq[j] * rule["beta2"] ** (missed + 1) + (1 - rule["beta2"]) * g * g
            denominator = exp_avg_sq[j].sqrt() / math.sqrt(1 - rule["beta2"] ** step) + rule["eps"]
            w = w - rule["lr"] / (1 - rule["beta1"] ** step) * exp_avg[j] / denominator
            weight[j] = w / w.norm().clamp_min(1e-12) if renormalize else w
    return weight, exp_avg, exp_avg_sq, last


def assert_no_worse(found, exact, eager, steps):
    """Within twice the error of PyTorch in fp32, or the rounding of that many steps."""
    for name, kernel, expected, theirs in zip(("weight", "exp_avg", "exp_avg_sq"), found, exact, eager):
        assert kernel.dtype == torch.float32
        error, their_error = ((t.double() - expected).abs().max() for t in (kernel, theirs))
        band = 2 * steps * EPS * expected.abs().max()
        assert error <= 2 * their_error + band, f"{name}: {error:.3g}, PyTorch's {their_error:.3g}"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_is_adam(dtype, shape, device):
    """Every row moves, with other rows listed in each step."""
    state, grads = start(*shape[:2], device), gradients(shape, 4, device, dtype)
    found = ours(state, grads, "dense", weight_decay=0.1)
    exact, eager = (torch_adam(state, grads, d, weight_decay=0.1) for d in (torch.float64, torch.float32))
    assert_no_worse(found, exact, eager, 4)
    assert (found[0] != state[0]).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.id not in ("vector", "one column")])
def test_dense_decoder(shape, device):
    state, grads = start(*shape[:2], device), gradients(shape, 4, device)
    rule = {**DECODER, "factor": torch.tensor(0.3, device=device)}
    found = ours(state, grads, "dense", **rule)
    exact, eager = (torch_adam(state, grads, d, **rule) for d in (torch.float64, torch.float32))
    assert_no_worse(found, exact, eager, 4)
    torch.testing.assert_close(found[0].norm(dim=1), torch.ones(shape[0], device=device), rtol=8 * EPS, atol=0)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("mode", ["lazy", "decayed"])
def test_rows_of_the_list(mode, decoder, shape, device):
    if decoder and shape[1] in (None, 1):
        pytest.skip("a decoder has rows")
    state, grads = start(*shape[:2], device), gradients(shape, 5, device)
    rule = {"factor": torch.tensor([0.3], device=device), **(DECODER if decoder else {})}
    found = ours(state, grads, mode, **rule)
    exact, eager = (row_by_row(state, grads, d, mode == "decayed", **rule) for d in (torch.float64, torch.float32))
    assert_no_worse(found, exact, eager, 5)
    assert torch.equal(found[3], exact[3])


def test_lazy_is_sparse_adam(device):
    """Which puts eps elsewhere: it must be too small to matter."""
    shape = (37, 20, 11)
    state = start(*shape[:2], device)
    # SparseAdam steps on rows of zeros too
    grads = [(features[rows.any(1)], rows[rows.any(1)]) for features, rows in gradients(shape, 5, device)]
    weight = state[0].double().requires_grad_()
    adam = torch.optim.SparseAdam([weight], RULE["lr"], eps=1e-30)
    for features, rows in grads:
        weight.grad = torch.sparse_coo_tensor(features[None], rows.double(), shape[:2], check_invariants=True)
        adam.step()
    found = ours(state, grads, "lazy", eps=1e-30)
    for part, expected in zip(found, (weight, adam.state[weight]["exp_avg"], adam.state[weight]["exp_avg_sq"])):
        torch.testing.assert_close(part.double(), expected.detach(), rtol=4 * EPS, atol=4 * EPS)


def test_decayed_moments_are_those_of_adam(device):
    """Once every row has been touched; weights of untouched rows have not moved meanwhile."""
    F, d = 23, 20
    state = start(F, d, device)
    grads = gradients((F, d, 4), 12, device)
    grads.append((torch.arange(F, device=device), torch.randn(F, d, device=device)))
    exact, eager = (torch_adam(state, grads, dtype) for dtype in (torch.float64, torch.float32))
    _, *moments, last = ours(state, grads, "decayed")
    assert_no_worse((exact[0].float(), *moments), exact, (exact[0], *eager[1:]), 4)
    assert (last == 13).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_list_means_every_row(mode, device):
    F, d = 19, 20
    state, (_, rows) = start(F, d, device), gradients((F, d, F), 1, device)[0]
    expected = ours(state, [(torch.arange(F, device=device), rows)] * 2, mode)
    for found, part in zip(ours(state, [(None, rows)] * 2, mode), expected):
        assert torch.equal(found, part)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.99, 0.99999), (0.5, 0.0)])
@pytest.mark.parametrize("step", [1, 2, 3, 10, 300, 5000, 10**6])
def test_bias_corrections(step, betas, device):
    """The first gradient of a row at this step: nothing but the two corrections makes its size."""
    weight, *moments, _ = start(3, None, device)
    weight.zero_()
    rule = RULE | {"beta1": betas[0], "beta2": betas[1], "eps": 1e-30}
    at = torch.tensor([float(step)], device=device)
    row_adam_(weight, *moments, torch.tensor([1.0, -2.0, 0.0], device=device), None, at, mode="dense", **rule)
    first, second = ((1 - beta) / (1 - beta**step) for beta in betas)
    expected = -rule["lr"] * first / math.sqrt(second)
    torch.testing.assert_close(weight.cpu(), expected * torch.tensor([1.0, -1.0, 0.0]), rtol=2e-6, atol=0)


def test_without_momentum_the_gradient_is_kept_whole(device):
    weight, exp_avg, exp_avg_sq, _ = start(2, 3, device)
    exp_avg += 1e6
    exp_avg_sq += 1e12
    grad = torch.full((2, 3), 1e-3, device=device)
    one = torch.ones((), device=device)
    row_adam_(weight, exp_avg, exp_avg_sq, grad, None, one, mode="dense", **(RULE | {"beta1": 0.0, "beta2": 0.0}))
    assert torch.equal(exp_avg, grad)
    assert torch.equal(exp_avg_sq, grad * grad)


@pytest.mark.parametrize("mode", ["lazy", "decayed"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_other_rows_stand_still(moments, mode, device):
    """Bit for bit and unread: they are NaN. So are those listed with a gradient of zeros."""
    F, d = 21, 20
    weight, exp_avg, exp_avg_sq, last = start(F, d, device, moments)
    features = torch.tensor([13, 2, 20, 0], device=device)
    rows = torch.randn(4, d, device=device)
    rows[1], rows[2], rows[2, 7] = -0.0, 0, 1e-30
    moved = torch.zeros(F, dtype=torch.bool, device=device)
    moved[[13, 20, 0]] = True
    for t in (weight, exp_avg, exp_avg_sq):
        t[~moved] = float("nan")
    copy = torch.full((F, d), 7.0, dtype=torch.bfloat16, device=device)
    before = weight.clone()
    step = torch.tensor(5.0, device=device)
    given = {"last": last if mode == "decayed" else None, "copy": copy, **RULE, **DECODER}
    row_adam_(weight, exp_avg, exp_avg_sq, rows, features, step, mode=mode, **given)
    assert torch.equal(weight.isfinite().all(1), moved)
    assert torch.equal(weight.isnan().all(1), ~moved)
    assert (weight != before)[moved].any(1).all()
    assert torch.equal(exp_avg.isfinite().all(1), moved)
    assert torch.equal(exp_avg_sq.isfinite().all(1), moved)
    assert torch.equal(copy.float(), torch.where(moved[:, None], weight.bfloat16().float(), 7.0))
    assert torch.equal(last, 5 * moved.int() if mode == "decayed" else torch.zeros_like(last))


def test_nan_stays_in_its_row(device):
    """Even one of all ones, which a carry would turn into a zero, and in a row that is made a unit."""
    grad = torch.ones(4, 20, device=device)
    grad.view(torch.int32)[2, 3] = 0x7FFFFFFF
    weight, *moments, _ = ours(start(4, 20, device, torch.bfloat16), [(None, grad)], "dense", renormalize=True)
    assert torch.equal(weight.isnan().sum(1).cpu(), torch.tensor([0, 0, 20, 0]))
    for moment in moments:
        assert torch.equal(moment.isnan().nonzero().cpu(), torch.tensor([[2, 3]]))


def test_zero_eps_on_a_row_shorter_than_its_tile(device):
    state, grads = start(5, 3, device), [(None, torch.ones(5, 3, device=device))]
    assert ours(state, grads, "dense", eps=0.0, renormalize=True)[0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_empty_list(mode, device):
    """Dense Adam still moves every row."""
    shape = (9, 20, 4)
    state = start(*shape[:2], device)
    nothing = (torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 20, device=device))
    grads = [*gradients(shape, 1, device), nothing]
    found = ours(state, grads, mode)
    if mode == "dense":
        exact, eager = (torch_adam(state, grads, dtype) for dtype in (torch.float64, torch.float32))
        assert_no_worse(found, exact, eager, 2)
    else:
        for part, expected in zip(found, ours(state, grads[:1], mode)):
            assert torch.equal(part, expected)
