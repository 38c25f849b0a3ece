import pytest
import torch

pytest.importorskip("triton")

from sampled_sae.kernels.rounded_rows import rounded_rows

pytestmark = pytest.mark.usefixtures("poisoned")

# [N, d]; the interpreter takes 16 rows and 16 of d at once
SHAPES = [
    pytest.param((1, 1), id="one of each"),
    pytest.param((16, 16), id="one tile"),
    pytest.param((19, 37), id="tails"),
    pytest.param((5, 48), id="tiles of d"),
]


def drawn(shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_bounds(found, exact):
    """From above, by no more than two hundredths."""
    assert found.dtype == torch.float32
    assert (found >= exact).all()
    assert (found <= 1.02 * exact + 1e-15).all()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_bounds(shape, scaled, device):
    rows = drawn(shape, device) * torch.logspace(-3, 3, shape[0], device=device)[:, None]
    factor = torch.tensor([0.37], device=device) if scaled else None
    values, norms, errors = rounded_rows(rows, factor)
    expected = rows * factor if scaled else rows
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, expected.bfloat16())
    assert_bounds(norms, expected.double().norm(dim=1))
    assert_bounds(errors, (expected.double() - values.double()).norm(dim=1))


def test_rounded_rows_of_strided_memory(device):
    rows = drawn((11, 20), device)
    wide = torch.cat((rows, torch.full_like(rows, torch.nan)), 1)[:, :20]
    for found, expected in zip(rounded_rows(wide), rounded_rows(rows)):
        assert torch.equal(found, expected)


def test_to_the_nearest_and_between_two_to_the_even_one(device):
    rows = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8 - 2.0**-20]], device=device)
    values, _, _ = rounded_rows(rows)
    assert values.tolist() == [[1.0, 1 + 2.0**-6, -1 - 2.0**-7]]


def test_bounds_of_what_is_too_small_to_be_squared(device):
    values, norms, errors = rounded_rows(torch.full((2, 5), 1e-30, device=device))
    assert (norms >= 1e-30 * 5**0.5).all()
    assert (errors >= (1e-30 - float(values[0, 0])) * 5**0.5).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3.4e38, 1e30])
def test_bounds_are_not_finite_where_nothing_is_known(value, device):
    rows = torch.ones(3, 4, device=device)
    rows[1, 2] = value
    _, norms, errors = rounded_rows(rows)
    assert norms.isfinite().tolist() == [True, False, True]
    assert errors[[0, 2]].isfinite().all()


def test_without_rows(device):
    found = rounded_rows(torch.zeros(0, 5, device=device))
    assert [tuple(t.shape) for t in found] == [(0, 5), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows must be fp32"),
        ({"rows": torch.zeros(4, 5).bfloat16()}, "rows must be fp32"),
        ({"rows": torch.zeros(5, 4).t()}, "rows must be fp32"),
        ({"factor": torch.zeros(2)}, r"factor must be .*\[1\]"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        rounded_rows(**{"rows": torch.zeros(4, 5), **change})
