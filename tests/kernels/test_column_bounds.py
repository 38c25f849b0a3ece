"""What bounds the sums of columns: spectral norms, squared norms from them, and signs."""

import pytest
import torch

pytest.importorskip("triton")

from sampled_sae.impl.dead_features import ranked
from sampled_sae.impl.triton.screen import RoundedRows
from sampled_sae.impl.triton.screen_columns import stretch, stretches
from sampled_sae.kernels.column_bounds import column_bounds
from sampled_sae.kernels.column_scores import column_statistics
from sampled_sae.kernels.firing_bounds import firing_bounds
from sampled_sae.kernels.rounded_rows import rounded_rows
from sampled_sae.kernels.spectral_bound import spectral_bound, trace_bound

pytestmark = pytest.mark.usefixtures("poisoned")


def drawn(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


MATRICES = [
    pytest.param((1, 1), lambda X: X, id="one number"),
    pytest.param((3, 40), lambda X: X, id="wide"),
    pytest.param((200, 30), lambda X: X * torch.logspace(0, -2, 30, device=X.device), id="decaying"),
    pytest.param((64, 64), lambda X: 1e6 * X, id="flat"),
    pytest.param((50, 20), lambda X: X + 30, id="one direction"),
    pytest.param((50, 20), lambda X: 1e-30 * X, id="tiny"),
    pytest.param((9, 20), torch.zeros_like, id="zeros"),
]


@pytest.mark.parametrize(("shape", "change"), MATRICES)
def test_stretches_are_bounds_and_not_loose_ones(shape, change, device):
    x = change(drawn(*shape, device=device))
    rows = RoundedRows(*rounded_rows(x))
    of_x, of_changes = stretches(rows, x - rows.values.float())
    for found, exact in ((of_x, rows.values.double()), (of_changes, x.double() - rows.values.double())):
        largest, frobenius = torch.linalg.matrix_norm(exact, 2), torch.linalg.matrix_norm(exact)
        assert largest <= found[0] <= 1.5 * largest + 1e-15
        assert frobenius <= found[1] <= 1.05 * frobenius + 1e-13


def test_a_single_direction_is_bounded_to_a_few_hundredths(device):
    """Then no power is needed, and what is added are margins alone."""
    x = torch.outer(drawn(60, device=device), drawn(16, device=device, seed=1))
    rows = RoundedRows(*rounded_rows(x))
    assert stretch(rows)[0] <= 1.05 * torch.linalg.matrix_norm(rows.values.double(), 2)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
def test_nothing_is_known_of_what_is_out_of_range(value, device):
    x = torch.ones(5, 4, device=device)
    x[2, 1] = value
    assert not stretch(RoundedRows(*rounded_rows(x)))[0].isfinite()


def encoder(shape, device, kind="normal", seed=0):
    """x, W, b, scale."""
    (B, d, F), g = shape, torch.Generator().manual_seed(seed)
    x, W, b = torch.randn(B, d, generator=g), torch.randn(F, d, generator=g), torch.randn(F, generator=g)
    if kind == "at the bound":
        x, W = (1 + 2.0**-8 - 2.0**-20) * torch.ones(B, d), (1 + 2.0**-8 - 2.0**-20) * W.sign()
    if kind == "tails":
        x, W = x * torch.randn(B, 1, generator=g).exp() ** 3, W * torch.randn(F, 1, generator=g).exp() ** 3
    return [t.to(device) for t in (x, W, b, torch.rand(F, generator=g) + 0.5)]


SHAPES = [(1, 1, 2), (67, 37, 45), (5, 16, 70)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["normal", "at the bound", "tails"])
@pytest.mark.parametrize("optional_arguments", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares_lie_between_their_bounds(shape, optional_arguments, kind, device):
    x, W, b, scale = encoder(shape, device, kind)
    b, scale = (b, scale) if optional_arguments else (None, None)
    rows, weights = RoundedRows(*rounded_rows(x)), RoundedRows(*rounded_rows(W))
    of_x, of_changes = stretches(rows, x - rows.values.float())
    seen = column_statistics(rows.values, weights.values, b, "l2", scale)[0]
    low, high = column_bounds(seen, weights.norms, weights.errors, b, scale, of_x, of_changes, *x.shape)
    a = (x.double() @ W.double().t() + (0 if b is None else b.double())).relu() * (1 if scale is None else scale)
    exact = a.square().sum(0)
    assert (low <= exact).all()
    assert (exact <= high).all()
    # a few hundredths of what the column would be without bias and ReLU
    size = torch.linalg.matrix_norm(x.double()) * weights.norms * (1 if scale is None else scale)
    assert (high.double().sqrt() - low.double().sqrt() <= 0.05 * size + 1e-4).all()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["normal", "at the bound", "tails"])
@pytest.mark.parametrize("optional_arguments", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_fire_between_their_bounds(shape, optional_arguments, kind, device):
    x, W, b, _ = encoder(shape, device, kind)
    b = b if optional_arguments else None
    rows, weights = RoundedRows(*rounded_rows(x)), RoundedRows(*rounded_rows(W))
    sure, possible = firing_bounds(*rows, *weights, b)
    z = x.double() @ W.double().t() + (0 if b is None else b.double())
    exact = (z > 0).sum(0)
    off = 0.02 * (rows.norms.double()[:, None] * weights.norms + (0 if b is None else 1e-6 * b.abs()))
    assert (sure <= exact).all()
    assert (exact <= possible).all()
    assert (sure >= (z > off).sum(0)).all()
    assert (possible <= (z > -off).sum(0)).all()


def test_a_column_of_which_nothing_is_known_is_bounded_by_infinity(device):
    """Never by NaN: that of a GPU has all bits but the sign, and one more would be -0.0."""
    sums, norms, errors = (drawn(6, 1, device=device)[:, 0].square() for _ in range(3))
    sums[0], norms[1], errors[2], norms[3] = torch.nan, torch.nan, torch.inf, 3e38
    b = torch.zeros(6, device=device)
    b[4] = torch.nan
    pair = torch.ones(2, device=device)
    low, high = column_bounds(sums, norms, errors, b, torch.ones_like(b), pair, pair, 3, 4)
    assert high.isposinf().tolist() == [True] * 5 + [False]
    assert low[:5].tolist() == [0] * 5
    assert not high.isnan().any()
    assert ranked(high, torch.ones(6, dtype=torch.bool, device=device)).argsort(stable=True)[0] == 5
    assert 0 <= low[5] < high[5]


def test_an_entry_of_which_nothing_is_known_may_fire(device):
    x, W, b, _ = encoder((5, 4, 20), device)
    b.fill_(-100)
    rows, weights = RoundedRows(*rounded_rows(x)), RoundedRows(*rounded_rows(W))
    rows.errors[3] = torch.nan
    sure, possible = firing_bounds(*rows, *weights, b)
    assert sure.tolist() == [0] * 20
    assert possible.tolist() == [1] * 20


def test_without_tokens(device):
    rows, weights = (RoundedRows(*rounded_rows(drawn(n, 4, device=device))) for n in (0, 6))
    assert torch.equal(firing_bounds(*rows, *weights, None), torch.zeros(2, 6, device=device))


def test_wrong_arguments():
    vector, pair, low = torch.ones(5), torch.ones(2), torch.ones(5, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"errors must be .*\[5\]"):
        trace_bound(vector, torch.ones(4))
    with pytest.raises(ValueError, match=r"trace must be .*\[2\]"):
        spectral_bound(vector, vector, vector, vector, vector, vector, 5)
    with pytest.raises(ValueError, match=r"errors_2 must be .*\[5\]"):
        spectral_bound(pair, vector, vector, vector, pair, vector, 5)
    with pytest.raises(ValueError, match="left must be"):
        spectral_bound(pair, vector, vector, vector, vector, vector, 5, torch.ones(3).double())
    with pytest.raises(ValueError, match=r"norms must be .*\[5\]"):
        column_bounds(vector, pair, vector, None, None, pair, pair, 3, 4)
    with pytest.raises(ValueError, match=r"of_changes must be .*\[2\]"):
        column_bounds(vector, vector, vector, None, None, pair, vector, 3, 4)
    with pytest.raises(ValueError, match="scale must be"):
        column_bounds(vector, vector, vector, None, pair, pair, pair, 3, 4)
    with pytest.raises(ValueError, match="x must be bf16"):
        firing_bounds(low.float(), vector, vector, low.float(), vector, vector, None)
    with pytest.raises(ValueError, match=r"W_norms must be .*\[5\]"):
        firing_bounds(low, vector, vector, low, pair, vector, None)
    with pytest.raises(ValueError, match=r"x_errors must be .*\[5\]"):
        firing_bounds(low, vector, pair, low, vector, vector, None)
