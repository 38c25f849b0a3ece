import pytest
import torch
from kernel_makers import FAR, NEEDS_VIRTUAL_MEMORY, SEARCH_SHAPES, assert_runs_alone, integers

pytest.importorskip("triton")

from sampled_sae.kernels import exact_fallback
from sampled_sae.kernels.exact_fallback import refill_exactly_

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def activations(x, W, b=None, scale=None, members=None):
    z = x.float() @ W.float().t()
    a = (z if b is None else z + b).relu()
    a = a if scale is None else a * scale
    return a if members is None else torch.zeros_like(a).index_copy_(1, members, a[:, members])


def best(a, n):
    """(values, keys) of the n largest positive entries by key, by a stable sort: ties to the lower index."""
    order = a.flatten().sort(descending=True, stable=True).indices[:n]
    keys = order[a.flatten()[order] > 0].sort().values
    return a.flatten()[keys], keys


def refilled(x, W, b, scale, members, n, tau=0.0, count=None, cap=None):
    """(values, keys, count) after a repair of a list full of rubbish, which overflowed unless `count` is given."""
    cap = n if cap is None else cap
    values = torch.full((cap,), NAN, device=x.device)
    keys = torch.full((cap,), -7, dtype=torch.int64, device=x.device)
    count = torch.tensor([cap + 1 if count is None else count], device=x.device)
    tau = torch.tensor([tau], device=x.device)
    refill_exactly_(x, W, b, scale, members, n, tau, values, keys, count)
    return values, keys, count


def assert_refilled(found, a, n):
    values, keys, count = found
    expected, expected_keys = best(a, n)
    assert int(count) == len(expected)
    ordered, order = keys[: len(expected)].sort()
    assert torch.equal(ordered, expected_keys)
    assert torch.equal(values[: len(expected)][order], expected)
    assert (values[len(expected) :] == 0).all()
    assert (keys[len(expected) :] == a.numel()).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", SEARCH_SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_finds_the_largest(share, shape, device):
    x, W, b, scale = integers(shape, torch.float32, device)
    a = activations(x, W, b, scale)
    n = max(1, round(share * a.numel()))
    assert_refilled(refilled(x, W, b, scale, None, n), a, n)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [None, range(3, 133, 4)], ids=["all", "pool"])
def test_dtypes_and_pools(members, dtype, device):
    x, W, b, scale = integers((45, 19, 133), dtype, device)
    members = None if members is None else torch.tensor(members, device=device)
    assert_refilled(refilled(x, W, b, scale, members, 200), activations(x, W, b, scale, members), 200)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, device):
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    b, scale = b if has_bias else None, scale if has_scale else None
    assert_refilled(refilled(x, W, b, scale, None, 200), activations(x, W, b, scale), 200)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 70, 257, 1120, 3500])
def test_ties_go_to_the_lower_token_then_feature(n, device):
    """All entries are equal, and the tokens before the last kept one are kept whole."""
    x, W = torch.ones(50, 2, device=device), torch.ones(70, 2, device=device)
    assert_refilled(refilled(x, W, None, None, None, n), torch.full((50, 70), 2.0, device=device), n)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", [(70, 300), (300, 70)])
@pytest.mark.parametrize("n", [19, 5000, 16001])
def test_ties_over_two_digits(n, shape, device):
    """More than 256 tokens or features; half of the entries are tied, the others are larger or zero."""
    a = torch.ones(shape, device=device)
    a[::5] = 0
    a[::7] = 3
    W = torch.ones(shape[1], 1, device=device)
    assert_refilled(refilled(a[:, :1].clone(), W, None, None, None, n), a, n)


def test_values_that_differ_in_the_last_bits(device):
    """Cuts that are told apart by the last digit alone, or by each of the others."""
    bits = 0x3F800000 + torch.randperm(400, generator=torch.Generator().manual_seed(0))
    bits[:130] += 1 << 16
    bits[130:270] += 1 << 24
    x = bits.to(torch.int32).view(torch.float32).view(400, 1).to(device)
    W = torch.ones(1, 1, device=device)
    for n in (1, 130, 135, 271, 399):
        assert_refilled(refilled(x, W, None, None, None, n), x, n)


@pytest.mark.parametrize("cap", [500, 3000])
def test_slots_behind_the_entries_are_cleared(cap, device):
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    a = activations(x, W, b, scale)
    assert_refilled(refilled(x, W, b, scale, None, 400, cap=cap), a, 400)
    b = b - 25
    assert 0 < int((activations(x, W, b, scale) > 0).sum()) < 400
    assert_refilled(refilled(x, W, b, scale, None, 400, cap=cap), activations(x, W, b, scale), 400)


def test_no_positives_at_all(device):
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    assert_refilled(refilled(x, W, b - 1000, scale, None, 7, cap=20), torch.zeros(45, 133, device=device), 7)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("count", "tau", "fails"),
    [
        (51, 0.0, True),
        (51, 1.0, True),
        (19, 1.0, True),
        (19, float("inf"), True),
        (19, NAN, True),
        (19, 1e-40, True),
        (50, 1.0, False),
        (20, 1.0, False),
        (19, 0.0, False),
        (19, -1.0, False),
        (0, 0.0, False),
    ],
)
def test_changes_nothing_unless_the_filter_failed(count, tau, fails, device):
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    found = refilled(x, W, b, scale, None, 20, tau, count, cap=50)
    if fails:
        assert_refilled(found, activations(x, W, b, scale), 20)
    else:
        assert found[0].isnan().all()
        assert (found[1] == -7).all()
        assert int(found[2]) == count


def test_real_numbers_match_what_the_kernel_itself_computes(device):
    """Kept and dropped entries are on their sides of the cut up to fp32 rounding."""
    make = torch.Generator().manual_seed(0)
    x, W = torch.randn(45, 40, generator=make).to(device), torch.randn(133, 40, generator=make).to(device)
    values, keys, count = refilled(x, W, None, None, None, 300)
    a = (x.double() @ W.double().t()).relu().flatten()
    assert int(count) == 300 == len(keys.unique())
    torch.testing.assert_close(values.double(), a[keys], rtol=1e-5, atol=1e-5)
    assert a[keys].min() >= a.sort(descending=True).values[299] - 1e-5


def test_same_set_every_run(device):
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randn(s, 40, generator=make).to(device, torch.bfloat16) for s in (45, 133))
    first, second = (refilled(x, W, None, None, None, 300) for _ in range(2))
    orders = [keys.argsort() for _, keys, _ in (first, second)]
    for one, other in zip(first[:2], second[:2]):
        assert torch.equal(one[orders[0]], other[orders[1]])


@pytest.mark.parametrize("layout", ["rows apart", "transposed"])
def test_strided_x_and_W(layout, device):
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    wide = (torch.nn.functional.pad(t, (3, 2), value=NAN)[:, 3:-2] for t in (x, W))
    other_x, other_W = (x.t().contiguous().t(), W) if layout == "transposed" else wide
    assert_refilled(refilled(other_x, other_W, b, scale, None, 200), activations(x, W, b, scale), 200)


def test_launches_as_many_passes_as_there_are_digits(device, monkeypatch):
    """Four of the value, one each of 45 tokens and 133 features, and the last one."""
    launches = []
    launch = exact_fallback.launch
    monkeypatch.setattr(exact_fallback, "launch", lambda *args, **kw: launches.append(1) or launch(*args, **kw))
    x, W, b, scale = integers((45, 19, 133), torch.float32, device)
    refilled(x, W, b, scale, None, 20)
    assert len(launches) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 6)}, r"x \[B, d\] and W \[F, d\]"),
        ({"W": torch.ones(7, 5).t()}, "pass W_enc.t"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"members": torch.ones(2)}, "members must be"),
        ({"tau": torch.ones(())}, "tau must be"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "values must be"),
        ({"keys": torch.ones(4, dtype=torch.int64)}, "keys must be"),
        ({"count": torch.ones(1)}, "count must be"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 4}, "fit the 3 slots, got 4"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "x": torch.ones(4, 7),
        "W": torch.ones(5, 7),
        "b": None,
        "scale": None,
        "members": None,
        "n": 2,
        "tau": torch.ones(1),
        "values": torch.ones(3),
        "keys": torch.ones(3, dtype=torch.int64),
        "count": torch.ones(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        refill_exactly_(**(arguments | change))


FAR_ROWS = """
from sampled_sae.kernels.exact_fallback import refill_exactly_
for x, W in ((far, near), (near, far)):
    values, keys, count = torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.full((1,), 5)
    refill_exactly_(x, W, None, None, None, 4, torch.zeros(1), values, keys, count)
    assert keys.sort().values.tolist() == [4, 5, 7, 8], keys
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR + FAR_ROWS, tmp_path)
