import pytest
import torch
from kernel_makers import (
    INTERPRETED,
    NEEDS_VIRTUAL_MEMORY,
    assert_runs_alone,
    counted_stores,
    drawn_spread,
    spread_of,
)

pytest.importorskip("triton")

from sampled_sae.kernels.arguments import Spread
from sampled_sae.kernels.chunk_filter import append_above_

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
NAN = float("nan")
# [B, C]; the interpreter's tiles are 8 tokens x 32 features
SHAPES = [
    pytest.param((1, 1), id="one of each"),
    pytest.param((8, 32), id="one tile"),
    pytest.param((29, 75), id="tails"),
]


def chunk(shape, device, seed=0):
    """z, b, scale in quarters: activations are exact, and many are equal."""
    make = torch.Generator().manual_seed(seed)
    z = torch.randint(-8, 9, shape, generator=make) / 4
    b = torch.randint(-2, 3, shape[1:], generator=make) / 4
    scale = torch.randint(1, 4, shape[1:], generator=make) / 2
    return z.to(device), b.to(device), scale.to(device)


def empty_list(cap, device):
    """values, keys, count, full of what must not be found there later."""
    values = torch.full((cap,), NAN, device=device)
    keys = torch.full((cap,), -7, dtype=torch.int64, device=device)
    return values, keys, torch.zeros(1, dtype=torch.int64, device=device)


def threshold(tau, device):
    return torch.tensor([tau], dtype=torch.float32, device=device)


def hits(z, b, scale, tau):
    """(values, tokens, columns) in order."""
    a = (z + b).relu() * scale
    tokens, columns = ((a > 0) & (a >= tau)).nonzero(as_tuple=True)
    return a[tokens, columns], tokens, columns


def in_order(values, keys, count):
    keys, order = keys[: int(count)].sort()
    return values[: int(count)][order], keys


@pytest.mark.one_in(7)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [-INF, -1.0, 0.0, 1e-40, 0.75, 0.8, 3.0, 100.0, INF, NAN])
def test_appends_what_is_above(tau, shape, device):
    z, b, scale = chunk(shape, device)
    values, keys, count = empty_list(z.numel(), device)
    append_above_(z, b, scale, 5, 100, threshold(tau, device), values, keys, count)
    expected, tokens, columns = hits(z, b, scale, tau)
    assert int(count) == len(expected)
    found_values, found_keys = in_order(values, keys, count)
    assert torch.equal(found_values, expected)
    assert torch.equal(found_keys, tokens * 100 + 5 + columns)
    assert (keys[int(count) :] == -7).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_vectors", [True, False])
def test_floors_are_strict_and_signed(has_vectors, shape, device):
    """One for each column, ties and infinities among them; what lies above a negative one is appended unchanged."""
    z, b, scale = chunk(shape, device)
    b, scale = (b, scale) if has_vectors else (None, None)
    make = torch.Generator().manual_seed(1)
    floors = (torch.randint(-9, 9, shape[1:], generator=make) / 4).to(device)
    floors[1::5], floors[2::5], floors[3::5] = INF, -INF, NAN
    values, keys, count = empty_list(z.numel(), device)
    tau = threshold(NAN, device)
    append_above_(z, b, scale, 5, 100, tau, values, keys, count, floors)
    a = (z + b) * scale if has_vectors else z
    tokens, columns = (a > floors).nonzero(as_tuple=True)
    found_values, found_keys = in_order(values, keys, count)
    assert torch.equal(found_values, a[tokens, columns])
    assert torch.equal(found_keys, tokens * 100 + 5 + columns)
    assert (keys[int(count) :] == -7).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_vectors", [True, False])
def test_with_a_spread_what_may_reach_the_floor_of_its_token(has_vectors, shape, device):
    """A NaN rules out nothing; what is at most 0 is out, whatever the floor."""
    z, b, scale = chunk(shape, device)
    spread, tau = drawn_spread(shape, device), (torch.arange(shape[0], device=device) % 7 - 2) / 2
    b, scale = (b, scale) if has_vectors else (None, None)
    z[-1, -1] = NAN
    tau[shape[0] // 2] = NAN
    values, keys, count = empty_list(z.numel(), device)
    append_above_(z, b, scale, 5, 100, tau, values, keys, count, spread=spread)
    most = z + spread_of(spread)
    most = ((most + b).relu() * scale) if has_vectors else most.relu()
    tokens, columns = (~(most <= 0) & ~(most < tau[:, None])).nonzero(as_tuple=True)
    found_values, found_keys = in_order(values, keys, count)
    torch.testing.assert_close(found_values, most[tokens, columns], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found_keys, tokens * 100 + 5 + columns)
    assert (keys[int(count) :] == -7).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_vectors", [True, False])
def test_with_a_spread_what_may_be_above_the_floor_of_its_feature(has_vectors, shape, device):
    z, b, scale = chunk(shape, device)
    b, scale = (b, scale) if has_vectors else (None, None)
    spread = drawn_spread(shape, device)
    floors = ((torch.arange(shape[1]) % 19 - 9) / 4).to(device)
    floors[1::5], floors[2::5] = INF, -INF
    z[-1, -1] = NAN
    values, keys, count = empty_list(z.numel(), device)
    append_above_(z, b, scale, 5, 100, floors, values, keys, count, floors, spread)
    most = z + spread_of(spread)
    most = (most + b) * scale if has_vectors else most
    tokens, columns = (~(most <= floors)).nonzero(as_tuple=True)
    found_values, found_keys = in_order(values, keys, count)
    torch.testing.assert_close(found_values, most[tokens, columns], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found_keys, tokens * 100 + 5 + columns)


def test_some_tile_has_hits_and_some_has_none(device):
    z = torch.zeros(29, 75, device=device)
    z[28, 74] = z[3, 40] = 1.0
    values, keys, count = empty_list(4, device)
    append_above_(z, None, None, 0, 75, threshold(0.5, device), values, keys, count)
    assert in_order(values, keys, count)[1].tolist() == [3 * 75 + 40, 28 * 75 + 74]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, device):
    z, b, scale = chunk((29, 75), device)
    values, keys, count = empty_list(z.numel(), device)
    b, scale = b if has_bias else None, scale if has_scale else None
    append_above_(z, b, scale, 0, 75, threshold(0.5, device), values, keys, count)
    expected, tokens, columns = hits(z, 0 if b is None else b, 1 if scale is None else scale, 0.5)
    found_values, found_keys = in_order(values, keys, count)
    assert torch.equal(found_values, expected)
    assert torch.equal(found_keys, tokens * 75 + columns)


def test_chunks_of_listed_features_add_up(device):
    """Two chunks, with features named by a list, go to one list; keys pass 2^31."""
    z, b, scale = chunk((29, 75), device)
    members = (torch.arange(75) * 2**27 + 3).to(device)
    F = 75 * 2**27
    values, keys, count = empty_list(z.numel(), device)
    for at in (slice(0, 40), slice(40, 75)):
        tau = threshold(0.75, device)
        append_above_(z[:, at], b[at], scale[at], members[at], F, tau, values, keys, count)
    expected, tokens, columns = hits(z, b, scale, 0.75)
    found_values, found_keys = in_order(values, keys, count)
    assert torch.equal(found_values, expected)
    assert torch.equal(found_keys, tokens * F + members[columns])


@pytest.mark.parametrize("cap", [0, 1, 37, 300])
def test_overflow_is_counted_and_not_written(cap, device):
    """Some 1200 hits; those that fit are true ones, and the memory behind the list stays as it was."""
    z, b, scale = chunk((29, 75), device)
    values, keys, count = empty_list(cap + 100, device)
    append_above_(z, b, scale, 0, 75, threshold(0.0, device), values[:cap], keys[:cap], count)
    expected, tokens, columns = hits(z, b, scale, 0.0)
    assert int(count) == len(expected) > 300
    assert values[cap:].isnan().all()
    assert (keys[cap:] == -7).all()
    where = torch.searchsorted(tokens * 75 + columns, keys[:cap])
    assert torch.equal((tokens * 75 + columns)[where], keys[:cap])
    assert torch.equal(expected[where], values[:cap])
    assert len(keys[:cap].unique()) == cap


def test_a_list_that_overflowed_by_more_than_32_bits(device):
    z, b, scale = chunk((29, 75), device)
    values, keys, count = empty_list(16, device)
    count += 2**31 + 17
    append_above_(z, b, scale, 0, 75, threshold(0.0, device), values, keys, count)
    assert int(count) == 2**31 + 17 + len(hits(z, b, scale, 0.0)[0])
    assert (keys == -7).all()


@INTERPRETED
def test_a_full_list_is_counted_without_looking_at_its_hits():
    z, b, scale = chunk((29, 75), "cpu")
    for before, most in ((16, 0), (15, 2 * 32)):
        values, keys, count = empty_list(16, "cpu")
        count += before
        with counted_stores() as made:
            append_above_(z, b, scale, 0, 75, threshold(0.0, "cpu"), values, keys, count)
        assert int(count) == before + len(hits(z, b, scale, 0.0)[0])
        assert len(made) <= most, "one program alone begins below the end: two stores for each bit of a word"


def test_nothing_is_appended_from_nan(device):
    z = torch.full((3, 4), NAN, device=device)
    values, keys, count = empty_list(4, device)
    append_above_(z, None, None, 0, 4, threshold(0.0, device), values, keys, count)
    assert int(count) == 0


@pytest.mark.parametrize("pad", [1, 16])
def test_rows_apart(pad, device):
    z, b, scale = chunk((29, 75), device)
    wide = torch.nn.functional.pad(z, (pad, pad), value=INF)[:, pad:-pad]
    values, keys, count = empty_list(z.numel(), device)
    append_above_(wide, b, scale, 0, 75, threshold(0.5, device), values, keys, count)
    assert torch.equal(in_order(values, keys, count)[0], hits(z, b, scale, 0.5)[0])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape, device):
    values, keys, count = empty_list(3, device)
    append_above_(torch.zeros(shape, device=device), None, None, 0, 5, threshold(0.0, device), values, keys, count)
    assert int(count) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(4, 5, dtype=torch.bfloat16)}, "z must be fp32"),
        ({"z": torch.ones(5, 4).t()}, "contiguous rows"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(5, 1)}, "scale must be"),
        ({"features": torch.ones(5)}, r"features must be contiguous torch.int64 \[5\]"),
        ({"tau": torch.ones(())}, "tau must be"),
        ({"floors": torch.ones(4)}, r"floors must be contiguous torch.float32 \[5\]"),
        ({"spread": Spread(*[torch.ones(5)] * 5)}, r"spread.norms must be contiguous torch.float32 \[4\]"),
        ({"spread": Spread(*[torch.ones(4)] * 2, *[torch.ones(5)] * 3)}, r"tau must be contiguous torch.float32 \[4\]"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "values must be"),
        ({"keys": torch.ones(4, dtype=torch.int64)}, r"keys must be contiguous torch.int64 \[3\]"),
        ({"count": torch.zeros(1, dtype=torch.int32)}, "count must be"),
    ],
)
def test_wrong_arguments(change, message):
    values, keys, count = empty_list(3, "cpu")
    arguments = {
        "z": torch.ones(4, 5),
        "b": None,
        "scale": None,
        "features": 0,
        "n_features": 5,
        "tau": torch.ones(1),
        "values": values,
        "keys": keys,
        "count": count,
    }
    with pytest.raises(ValueError, match=message):
        append_above_(**(arguments | change))


FAR_ROWS = """
import torch
from sampled_sae.kernels.chunk_filter import append_above_
far = torch.empty_strided((3, 8), (2**30 + 16, 1))  # untouched pages cost nothing
far.copy_(torch.arange(24).reshape(3, 8))
values, keys, count = torch.zeros(24), torch.zeros(24, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
append_above_(far, None, None, 0, 8, torch.zeros(1), values, keys, count)
assert torch.equal(keys[:23].sort().values, torch.arange(1, 24))
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR_ROWS, tmp_path)
