import pytest
import torch

pytest.importorskip("triton")

from sampled_sae.kernels.column_scores import column_statistics
from sampled_sae.kernels.undecided_columns import settled_statistics, statistics_of

pytestmark = pytest.mark.usefixtures("poisoned")

# [B, d, F]; the interpreter's tiles are 32 tokens x 16 dimensions x 16 features, and 3 programs walk over them
SHAPES = [
    pytest.param((1, 1, 16), id="one token"),
    pytest.param((67, 37, 45), id="tails"),
    pytest.param((33, 17, 252), id="many columns"),
]


def inputs(shape, device, seed=0):
    """x, W, b, scale."""
    (B, d, F), g = shape, torch.Generator().manual_seed(seed)
    drawn = torch.randn(B, d, generator=g), torch.randn(F, d, generator=g), torch.randn(F, generator=g) / 2
    return [t.to(device) for t in (*drawn, torch.rand(F, generator=g) + 0.5)]


def around(statistics, width):
    """Bounds that hold: the lower and the upper ones are off by different shares of `width`."""
    below, above = torch.linspace(0, 1, len(statistics)), torch.linspace(1, 0, len(statistics))
    below, above = below.to(statistics.device), above.to(statistics.device)
    return (statistics * (1 - width * below)).clamp(min=0), statistics * (1 + width * above)


def open_columns(low, high, size):
    """bool [F], by sorting."""
    sure = low > high.sort(descending=True).values[size]
    out = high < low.sort(descending=True).values[size - 1]
    return ~sure & ~out & (low < high)


def largest(keys, size):
    return keys.sort(descending=True, stable=True).indices[:size].sort().values


@pytest.mark.one_in(5)
@pytest.mark.parametrize("score", ["l2", "uniform"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [0.0, 0.01, 0.1, 2.0])
def test_the_largest_are_those_of_all_columns_in_full(width, shape, score, device):
    x, W, b, scale = inputs(shape, device)
    exact = column_statistics(x, W, b, score, scale)[0]
    low, high = around(exact, width)
    for size in {1, shape[2] // 4, shape[2] - 1}:
        found, opened = settled_statistics(x, W, b, scale, score, low, low, high, size)
        assert torch.equal(largest(found, size), largest(exact, size))
        is_open = open_columns(low, high, size)
        if is_open.sum() > max(1, shape[2] // 8):
            assert torch.equal(found, exact)
            assert opened.tolist() == [shape[2]]
        else:
            assert torch.equal(found[is_open], exact[is_open]), "the bits of the sums of all columns"
            assert opened.tolist() == [int(is_open.sum())]


@pytest.mark.parametrize("optional_arguments", [True, False])
def test_ties_of_what_is_open(optional_arguments, device):
    """Columns that are copies of each other: those that are open get equal sums."""
    x, W, b, scale = inputs((20, 6, 96), device)
    W[40:48], b[40:48], scale[40:48] = 2 * W[40].abs() * x[0].sign(), b[40], scale[40]
    vectors = (b, scale) if optional_arguments else (None, None)
    exact = column_statistics(x, W, vectors[0], "l2", vectors[1])[0]
    low, high = exact.clone(), exact.clone()
    low[40:48] *= 0.999
    high[40:48] *= 1.001
    size = int((exact > exact[40]).sum()) + 3
    found, opened = settled_statistics(x, W, *vectors, "l2", low, low, high, size)
    assert opened.tolist() == [8]
    assert torch.equal(found[40:48], exact[40:48])
    assert torch.equal(largest(found, size), largest(exact, size))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bound_that_is_not_finite_asks_for_all_columns(bad, device):
    x, W, b, scale = inputs((20, 6, 96), device)
    exact = column_statistics(x, W, b, "l2", scale)[0]
    low, high = around(exact, 0.0)
    high[7] = bad
    found, opened = settled_statistics(x, W, b, scale, "l2", low, low, high, 10)
    assert opened.tolist() == [96]
    assert torch.equal(found, exact)


def test_columns_ranked_by_something_else(device):
    """Weights turn the order around; what is known stands for columns that are not open."""
    x, W, b, scale = inputs((20, 6, 96), device)
    exact = column_statistics(x, W, b, "l2", scale)[0]
    low, high = around(exact, 0.1)
    weights = 1 / exact.square().clamp(min=1e-3)
    found, opened = settled_statistics(x, W, b, scale, "l2", low, low * weights, high * weights, 40)
    assert 0 < int(opened) == int(open_columns(low * weights, high * weights, 40).sum()) <= 12
    assert torch.equal(largest(found * weights, 40), largest(exact * weights, 40))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("score", ["l2", "uniform"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [0, 1, 5, 252])
def test_columns_that_are_asked_for(n, shape, score, device):
    """With others where there is no room for a list of them."""
    x, W, b, scale = inputs(shape, device)
    exact = column_statistics(x, W, b, score, scale)[0]
    wanted = torch.zeros(shape[2], dtype=torch.bool, device=device)
    wanted[torch.randperm(shape[2], generator=torch.Generator().manual_seed(1))[:n].to(device)] = True
    found, opened = statistics_of(x, W, b, scale, score, wanted)
    n_wanted, room = int(wanted.sum()), max(1, shape[2] // 8)
    assert opened.tolist() == [shape[2] if n_wanted > room else n_wanted]
    assert torch.equal(found, exact if n_wanted > room else torch.where(wanted, exact, 0))


@pytest.mark.parametrize("layout", ["x", "W"])
def test_undecided_columns_of_strided_memory(layout, device):
    x, W, b, scale = inputs((20, 6, 45), device)
    exact = column_statistics(x, W, b, "l2", scale)[0]
    low, high = around(exact, 0.2)
    expected = settled_statistics(x, W, b, scale, "l2", low, low, high, 10)
    wide = torch.nn.functional.pad(x if layout == "x" else W, (0, 10), value=float("nan"))[:, :6]
    found = settled_statistics(*((wide, W) if layout == "x" else (x, wide)), b, scale, "l2", low, low, high, 10)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "entropy"}, "score must be l2, l2_squared or uniform, got 'entropy'"),
        ({"size": 0}, "size must be from 1 to 4"),
        ({"size": 5}, "size must be from 1 to 4"),
        ({"x": torch.ones(0, 7)}, "x must have a token"),
        ({"x": torch.ones(3, 7).bfloat16()}, "x must be fp32"),
        ({"low": torch.ones(4)}, r"low must be .*\[5\]"),
        ({"high": torch.ones(5).double()}, "high must be"),
        ({"known": torch.ones(5, 1)}, "known must be"),
        ({"W": torch.ones(7, 5).t()}, "pass W_enc.t"),
    ],
)
def test_wrong_arguments(change, message):
    given = {"x": torch.ones(3, 7), "W": torch.ones(5, 7), "b": None, "scale": None, "score": "l2"}
    bounds = {name: torch.ones(5) for name in ("known", "low", "high")}
    with pytest.raises(ValueError, match=message):
        settled_statistics(**(given | bounds | {"size": 2} | change))


@pytest.mark.parametrize("wanted", [torch.ones(5), torch.ones(4, dtype=torch.bool), torch.ones(5, 1, dtype=torch.bool)])
def test_columns_that_cannot_be_asked_for(wanted):
    with pytest.raises(ValueError, match="wanted must be"):
        statistics_of(torch.ones(3, 7), torch.ones(5, 7), None, None, "l2", wanted)
