"""The thresholds that chunk_filter.py finds for the filter: the first of a training, and the next batch's."""

import pytest
import torch
from kernel_makers import products

pytest.importorskip("triton")

from sampled_sae.kernels.chunk_filter import first_threshold, next_threshold

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
NAN = float("nan")


@pytest.mark.parametrize("n", [1, 100, 600, 1200, 29 * 75])
@pytest.mark.parametrize("has_vectors", [True, False])
def test_first_threshold_is_the_nth_largest(has_vectors, n, device):
    z, b, scale = products((29, 75), device, levels=4)
    expected = ((z + b).relu() * scale if has_vectors else z.relu()).flatten().sort(descending=True).values[n - 1]
    found = first_threshold(z, b if has_vectors else None, scale if has_vectors else None, n)
    assert found.tolist() == [expected]


def test_first_threshold_says_what_is_wrong():
    with pytest.raises(ValueError, match="n must be between 1 and 20, got 21"):
        first_threshold(torch.ones(4, 5), None, None, 21)
    with pytest.raises(ValueError, match="z must be contiguous"):
        first_threshold(torch.ones(4, 6)[:, :5], None, None, 1)


def next_of(smallest, tau, count, n, device):
    count, tau = torch.tensor([count], device=device), torch.tensor([tau], device=device)
    return float(next_threshold(torch.tensor(smallest, device=device), tau, count, n))


def test_next_threshold_finds_the_margin_of_an_exponential_tail(device):
    """count(t) = 1000 exp(-3 (t - 2)): from any two points of the tail to the one with 1.4 of the budget."""
    tail = torch.distributions.Exponential(3.0)
    expected = 2 - float(tail.icdf(torch.tensor(1 - 1 / 1.4)))
    for tau in (1.7, 1.8, 1.9, 1.99):
        count = round(1000 * torch.tensor(3 * (2 - tau)).exp().item())
        assert next_of(2.0, tau, count, 1000, device) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("smallest", "tau", "count", "share"),
    [
        (2.0, 5.0, 1000, 0.96),
        (2.0, NAN, 1000, 0.96),
        (2.0, 0.0, 1000, 0.96),
        (2.0, 2.0, 1500, 0.99),
        (2.0, 1.0, 1001, 0.8),
        (2.0, -INF, 2000, 0.8),
        (2.0, 0.0, 1010, 0.8),
    ],
)
def test_next_threshold_stays_near_the_smallest(smallest, tau, count, share, device):
    assert next_of(smallest, tau, count, 1000, device) == pytest.approx(share * smallest)


@pytest.mark.parametrize("count", [0, 999])
def test_next_threshold_is_zero_after_a_budget_not_filled(count, device):
    assert next_of(0.0, 0.0, count, 1000, device) == 0
