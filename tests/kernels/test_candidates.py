import pytest
import torch
from kernel_makers import integers

pytest.importorskip("triton")

from sampled_sae.kernels.candidates import compute_candidates_

pytestmark = pytest.mark.usefixtures("poisoned")

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, d, F; the interpreter takes 8 entries and 16 of d at once
SHAPE = (13, 37, 50)


def operands(device, dtype=torch.float32):
    """x, W, b, scale in small whole numbers: activations are exact."""
    x, W, b, scale = integers(SHAPE, torch.float32, device)
    return x, W.to(dtype), b, scale


def candidates(cap, seen, device):
    """values, keys, seen: every seventh entry in a shuffled order, then what must not be read."""
    B, _, F = SHAPE
    make = torch.Generator().manual_seed(1)
    keys = torch.full((cap,), -7)
    n = min(cap, seen)
    keys[:n] = torch.randperm(B * F // 7, generator=make)[:n] * 7
    return torch.full((cap,), NAN, device=device), keys.to(device), torch.tensor([seen], device=device)


def activations(x, W, b, scale, strict):
    a = x @ W.float().t()
    a = a if b is None else a + b
    a = a if strict else a.relu()
    return a if scale is None else a * scale


def floors_of(strict, device):
    return ((torch.arange(SHAPE[2] if strict else SHAPE[0]) % 9 - 4) * 2.0).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, strict, dtype, device):
    x, W, b, scale = operands(device, dtype)
    b, scale = b if has_bias else None, scale if has_scale else None
    values, keys, seen = candidates(90, 83, device)
    given = keys[:83].clone()
    floors = floors_of(strict, device)
    count, computed = compute_candidates_(x, W, b, scale, floors, strict, values, keys, seen)
    B, F = len(x), len(W)
    a = activations(x, W, b, scale, strict)
    reach = a > floors if strict else (a > 0) & (a >= floors[:, None])
    kept = reach.flatten()[given]
    assert 0 < int(count) == int(kept.sum()) < 83
    assert computed.tolist() == [83]
    assert torch.equal(values[:83], torch.where(kept, a.flatten()[given], 0.0))
    assert torch.equal(keys[:83], torch.where(kept, given, B * F))
    assert values[83:].isnan().all()
    assert (keys[83:] == -7).all()
    assert seen.tolist() == [83]


@pytest.mark.parametrize("cap", [1, 8, 33])
def test_a_full_list_and_one_that_overflowed(cap, device):
    x, W, b, scale = operands(device)
    floors = torch.zeros(len(x), device=device)
    for more in (0, 1, 2**33):
        values, keys, seen = candidates(cap, cap, device)
        given, seen = keys.clone(), seen + more
        count, computed = compute_candidates_(x, W, b, scale, floors, False, values, keys, seen)
        if more:
            assert count.tolist() == computed.tolist() == [cap + more]
            assert torch.equal(keys, given)
            assert values.isnan().all()
        else:
            kept = activations(x, W, b, scale, False).flatten()[given] > 0
            assert count.tolist() == [int(kept.sum())]
            assert torch.equal(keys, torch.where(kept, given, len(x) * len(W)))


def test_what_its_bound_keeps_below_a_risen_floor_is_not_computed(device):
    x, W, b, scale = operands(device)
    values, keys, seen = candidates(40, 40, device)
    given = keys.clone()
    values[:] = torch.where(torch.arange(40, device=device) % 3 == 0, -1.0, NAN)
    count, computed = compute_candidates_(x, W, b, scale, torch.zeros(len(x), device=device), False, values, keys, seen)
    a = activations(x, W, b, scale, False).flatten()[given]
    kept = (a > 0) & (torch.arange(40, device=device) % 3 != 0)
    assert torch.equal(values, torch.where(kept, a, 0.0))
    assert count.tolist() == [int(kept.sum())]
    assert computed.tolist() == [26]


def test_what_is_not_a_number_reaches_no_floor(device):
    x, W, b, scale = operands(device)
    x[:] = NAN
    for strict in (True, False):
        values, keys, seen = candidates(20, 20, device)
        counts = compute_candidates_(x, W, b, scale, floors_of(strict, device), strict, values, keys, seen)
        assert [count.tolist() for count in counts] == [[0], [20]]
        assert not values.any()


@pytest.mark.parametrize("pad", [1, 16])
def test_rows_apart(pad, device):
    x, W, b, scale = operands(device)
    wide_x, wide_W = (torch.nn.functional.pad(t, (pad, pad), value=NAN)[:, pad:-pad] for t in (x, W))
    found = []
    for of in ((x, W), (wide_x, wide_W)):
        values, keys, seen = candidates(60, 60, device)
        compute_candidates_(*of, b, scale, floors_of(False, device), False, values, keys, seen)
        found.append(values)
    assert torch.equal(*found)


def test_the_same_bits_wherever_an_entry_stands(device):
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 77, generator=make).to(device) for n in (13, 50))
    floors = torch.zeros(13, device=device)
    _, keys, seen = candidates(60, 60, device)
    order = torch.randperm(60, generator=make).to(device)
    found = []
    for at in (torch.arange(60, device=device), order):
        values, listed = torch.full((60,), NAN, device=device), keys[at].contiguous()
        compute_candidates_(x, W, None, None, floors, False, values, listed, seen)
        found.append(values)
    assert torch.equal(found[0][order], found[1])


def test_nothing_to_compute(device):
    x, W, b, scale = operands(device)
    values, keys, seen = candidates(0, 3, device)
    counts = compute_candidates_(x, W, b, scale, floors_of(False, device), False, values, keys, seen)
    assert [count.tolist() for count in counts] == [[3], [3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 3)}, r"x \[B, d\] and W \[F, d\] expected"),
        ({"W": torch.ones(2, 5).t()}, "weights of each feature must be contiguous"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(4)}, "scale must be"),
        ({"floors": torch.ones(5)}, r"floors must be contiguous torch.float32 \[4\]"),
        ({"strict": True}, r"floors must be contiguous torch.float32 \[5\]"),
        ({"values": torch.ones(3).double()}, "values must be"),
        ({"keys": torch.ones(4, dtype=torch.int64)}, r"keys must be contiguous torch.int64 \[3\]"),
        ({"seen": torch.ones(1)}, "seen must be"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "x": torch.ones(4, 2),
        "W": torch.ones(5, 2),
        "b": None,
        "scale": None,
        "floors": torch.ones(4),
        "strict": False,
        "values": torch.ones(3),
        "keys": torch.zeros(3, dtype=torch.int64),
        "seen": torch.ones(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        compute_candidates_(**(arguments | change))
