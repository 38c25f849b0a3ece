import pytest
import torch
from kernel_makers import (
    FAR,
    INTERPRETED,
    NEEDS_VIRTUAL_MEMORY,
    SEARCH_SHAPES,
    assert_runs_alone,
    counted_stores,
    integers,
)

pytest.importorskip("triton")

from sampled_sae.kernels import configs, product_filter
from sampled_sae.kernels.exact_fallback import refill_exactly_
from sampled_sae.kernels.product_filter import append_products_above_

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float16]
INF = float("inf")
NAN = float("nan")


def products(x, W, b, scale):
    z = x.float() @ W.float().t()
    z = z if b is None else z + b
    return z if scale is None else z * scale


def of_members(mask, members):
    return mask if members is None else torch.zeros_like(mask).index_copy_(1, members, mask[:, members])


def appended(x, W, b, scale, members, tau, cap=None, before=0, floors=None):
    """(values, keys, count) of a list of rubbish that had `before` entries."""
    cap = len(x) * len(W) if cap is None else cap
    values, keys = torch.full((cap,), NAN, device=x.device), torch.full((cap,), -7, device=x.device)
    count = torch.tensor([before], device=x.device)
    tau = torch.tensor([tau], device=x.device)
    append_products_above_(x, W, b, scale, members, tau, values, keys, count, floors)
    return values, keys, count


def assert_appended(found, z, mask, before=0):
    """Exactly the entries of the mask, in any order, behind those before; all other places as they were."""
    values, keys, count = found
    expected = mask.flatten().nonzero().squeeze(1)
    end = before + len(expected)
    assert int(count) == end
    ordered, order = keys[before:end].sort()
    assert torch.equal(ordered, expected)
    assert torch.equal(values[before:end][order], z.flatten()[expected])
    for start, stop in ((0, before), (end, len(keys))):
        assert values[start:stop].isnan().all()
        assert (keys[start:stop] == -7).all()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("shape", SEARCH_SHAPES)
@pytest.mark.parametrize("tau", [-1.0, 0.0, 3.0, 6.0, 1000.0])
def test_products_above_a_threshold(tau, shape, device):
    x, W, b, scale = integers(shape, torch.bfloat16, device)
    z = products(x, W, b, scale)
    assert_appended(appended(x, W, b, scale, None, tau), z, (z > 0) & (z >= tau))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [None, range(3, 133, 4)], ids=["all", "pool"])
@pytest.mark.parametrize("has_vectors", [True, False])
def test_dtypes_pools_and_optional_arguments(has_vectors, members, dtype, device):
    x, W, b, scale = integers((45, 19, 133), dtype, device)
    b, scale = (b, scale) if has_vectors else (None, None)
    members = None if members is None else torch.tensor(members, device=device)
    z = products(x, W, b, scale)
    mask = of_members(z >= 2, members)
    assert_appended(appended(x, W, b, scale, members, 2.0, before=5, cap=7000), z, mask, 5)


@pytest.mark.parametrize("members", [None, range(3, 133, 4)], ids=["all", "pool"])
def test_floors_of_features_may_be_negative(members, device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    members = None if members is None else torch.tensor(members, device=device)
    floors = torch.randint(-3, 4, (133,), generator=torch.Generator().manual_seed(5)).float().to(device)
    z = products(x, W, b, scale)
    mask = of_members(z > floors, members)
    assert int((mask & (z < 0)).sum()) > 0
    assert_appended(appended(x, W, b, scale, members, NAN, floors=floors), z, mask)


@pytest.mark.parametrize("tau", [NAN, INF, -INF, 1e-45])
def test_thresholds_at_the_edge_of_numbers(tau, device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    x[3], W[4], b[4] = 0, 0, 0
    x[3, 0], W[4, 0] = 3e38, 3e38
    z = products(x, W, b, scale)
    assert z[3, 4] == INF
    assert_appended(appended(x, W, b, scale, None, tau), z, (z > 0) & (z >= tau))


def test_what_is_not_a_number_is_not_appended(device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    x[7], b[9] = NAN, NAN
    z = products(x, W, b, scale)
    assert_appended(appended(x, W, b, scale, None, 2.0), z, z >= 2)


def every_entry(b):
    b[:] = 1000


def one_token_a_tile(b):
    b[:] = -1000
    b[::32] = 1000


@pytest.mark.parametrize("change", [every_entry, one_token_a_tile])
@pytest.mark.parametrize("BN", [16, 128])
def test_words_of_many_hits(BN, change, device, monkeypatch):
    """On NVIDIA a word of 128 tokens has 32 bits, the sign among them."""
    config = configs.tile(32, BN, 16, 4, 1)
    monkeypatch.setattr(product_filter, "product_filter_config", lambda *_: config)
    x, W, b, scale = integers((200, 5, 70), torch.bfloat16, device)
    change(b)
    z = products(x, W, b, scale)
    assert_appended(appended(x, W, b, scale, None, 0.0), z, z > 0)


@pytest.mark.parametrize("cap", [0, 1, 1000])
def test_more_than_fits_is_counted(cap, device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    z = products(x, W, b, scale)
    values, keys, count = appended(x, W, b, scale, None, 1.0, cap=cap)
    assert int(count) == int((z >= 1).sum()) > cap
    assert len(keys.unique()) == cap
    assert torch.equal(values, z.flatten()[keys])
    assert (values >= 1).all()


@INTERPRETED
def test_a_full_list_is_counted_without_looking_at_its_hits():
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, "cpu")
    found = int((products(x, W, b, scale) >= 1).sum())
    for before, most in ((8, 0), (7, 2 * 8)):
        with counted_stores() as made:
            _, _, count = appended(x, W, b, scale, None, 1.0, cap=8, before=before)
        assert int(count) == before + found
        assert len(made) <= most, "one tile alone begins below the end: two stores for each of the 8 bits of a word"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_repair_finds_the_same_bits(dtype, device):
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 70, generator=make).to(device, dtype) for n in (45, 133))
    b, scale = torch.randn(133, generator=make).to(device), (torch.rand(133, generator=make) + 0.5).to(device)
    values, keys, count = appended(x, W, b, scale, None, 9.0)
    n = int(count)
    assert 50 < n < 2000
    exact = (x.double() @ W.double().t() + b).relu() * scale
    torch.testing.assert_close(values[:n].double(), exact.flatten()[keys[:n]], rtol=1e-5, atol=1e-5)
    again = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    refill_exactly_(x, W, b, scale, None, n, torch.zeros(1, device=device), *again, count + 1)
    for one, other in zip((values[:n], keys[:n]), again):
        assert torch.equal(one[keys[:n].argsort()], other[again[1].argsort()])


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_a_repair_multiplies_in_the_same_tiles(dtype, arch):
    ours, theirs = configs.product_filter_config(arch, dtype), configs.exact_fallback_config(arch, dtype)
    assert ours.kwargs == {name: theirs.kwargs[name] for name in ours.kwargs}
    assert (ours.num_warps, ours.num_stages) == (theirs.num_warps, theirs.num_stages)


@pytest.mark.parametrize("layout", ["rows apart", "transposed"])
def test_products_of_strided_operands(layout, device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    wide = (torch.nn.functional.pad(t, (3, 2), value=NAN)[:, 3:-2] for t in (x, W))
    other_x, other_W = (x.t().contiguous().t(), W) if layout == "transposed" else wide
    z = products(x, W, b, scale)
    assert_appended(appended(other_x, other_W, b, scale, None, 2.0), z, z >= 2)


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 3, 0)])
def test_nothing_of_nothing(shape, device):
    x, W, b, scale = integers(shape, torch.bfloat16, device)
    assert_appended(appended(x, W, b, scale, None, 0.0, cap=4), x.new_zeros(0, dtype=torch.float32), x.new_zeros(0) > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 6, dtype=torch.bfloat16)}, r"x \[B, d\] and W \[F, d\]"),
        ({"x": torch.ones(4, 7), "W": torch.ones(5, 7)}, "16 bits, got torch.float32"),
        ({"W": torch.ones(7, 5, dtype=torch.bfloat16).t()}, "pass W_enc.t"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"members": torch.ones(2)}, "members must be"),
        ({"tau": torch.ones(())}, "tau must be"),
        ({"floors": torch.ones(4)}, "floors must be"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "values must be"),
        ({"keys": torch.ones(4, dtype=torch.int64)}, "keys must be"),
        ({"count": torch.ones(1)}, "count must be"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "x": torch.ones(4, 7, dtype=torch.bfloat16),
        "W": torch.ones(5, 7, dtype=torch.bfloat16),
        "b": None,
        "scale": None,
        "members": None,
        "tau": torch.ones(1),
        "values": torch.ones(3),
        "keys": torch.ones(3, dtype=torch.int64),
        "count": torch.ones(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        append_products_above_(**(arguments | change))


FAR_ROWS = """
from sampled_sae.kernels.product_filter import append_products_above_
for x, W in ((far, near), (near, far)):
    values, keys, count = torch.zeros(9), torch.zeros(9, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    append_products_above_(x, W, None, None, None, torch.full((1,), 900.0), values, keys, count)
    assert count.tolist() == [4] and keys[:4].sort().values.tolist() == [4, 5, 7, 8], (count, keys)
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR + FAR_ROWS, tmp_path)
