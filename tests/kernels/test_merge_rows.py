import pytest
import torch

pytest.importorskip("triton")

from kernel_makers import drawn_spread, masked, products, spread_of

from sampled_sae.kernels.arguments import Spread
from sampled_sae.kernels.merge_rows import MAX_CHUNK, MAX_K, merge_rows_

pytestmark = pytest.mark.usefixtures("poisoned")

UNUSED = 2**31 - 1
GPU = torch.cuda.is_available()


def streamed(z, k, C, b=None, scale=None, features=None):
    """All columns of z, merged C at a time."""
    B, F = z.shape
    values = torch.zeros(B, k, device=z.device)
    best = torch.full((B, k), UNUSED, dtype=torch.int32, device=z.device)
    for start in range(0, F, C):
        chunk = slice(start, start + C)
        parts = [None if t is None else t[chunk].contiguous() for t in (b, scale)]
        first = start if features is None else features[chunk]
        merge_rows_(values, best, z[:, chunk].contiguous(), first, *parts)
    return values, best


def sorted_entries(a, k, features=None):
    """What a merge of all columns of a must give: the kept ones by feature, then the unused slots."""
    kept = masked(a, k) > 0
    features = torch.arange(a.shape[1], device=a.device) if features is None else features
    named = torch.where(kept, features, UNUSED)
    best, at = torch.nn.functional.pad(named, (0, k), value=UNUSED).sort(dim=1, stable=True)
    values = torch.nn.functional.pad(a * kept, (0, k)).gather(1, at)
    return values[:, :k], best[:, :k].int()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("C", [16, 37, 100])
@pytest.mark.parametrize("k", [1, 5, 32, 120])
def test_stream_of_chunks_gives_the_largest_of_all(k, C, levels, device):
    z, b, scale = products((6, 100), device, levels)
    a = (z + b).relu() * scale
    for found, expected in zip(streamed(z, k, C, b, scale), sorted_entries(a, k)):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_chunks_of_every_configuration(device):
    """One row of each number of warps, written in several parts."""
    for C in (600, 3000, 8192):
        z, b, scale = products((2, 8192), device, seed=C)
        a = (z + b).relu() * scale
        for found, expected in zip(streamed(z, 64, C, b, scale), sorted_entries(a, 64)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_chunks_of_listed_features(has_bias, has_scale, device):
    z, b, scale = products((6, 40), device)
    b, scale = b if has_bias else None, scale if has_scale else None
    a = (z + (0 if b is None else b)).relu() * (1 if scale is None else scale)
    features = torch.arange(40, device=device) * 3 + 1_000_000
    found = streamed(z, 5, 16, b, scale, features)
    for f, e in zip(found, sorted_entries(a, 5, features)):
        assert torch.equal(f, e)


def test_row_with_nothing_better_stays_as_it_is(device):
    """Equal entries of higher features do not enter; a row beside it does change."""
    values = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0], [2.0, 0.0, 0.0]], device=device)
    features = torch.tensor([[3, 5, 6], [3, 5, 6], [4, UNUSED, UNUSED]], dtype=torch.int32, device=device)
    z = torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.5, 2.0], [-1.0, 0.5, 0.0]], device=device)
    merge_rows_(values, features, z, 7)
    assert values.tolist() == [[1, 2, 1], [2, 1.5, 2], [2, 0.5, 0]]
    assert features.tolist() == [[3, 5, 6], [5, 8, 9], [4, 8, UNUSED]]


def test_ties_among_old_entries_go_to_the_lower_feature(device):
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0]], device=device)
    features = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32, device=device)
    merge_rows_(values, features, torch.tensor([[1.0, 3.0, 1.0]], device=device), 10)
    assert values.tolist() == [[1, 1, 1, 3]]
    assert features.tolist() == [[0, 1, 2, 11]]


def test_nothing_to_merge(device):
    values, features = torch.ones(3, 2, device=device), torch.ones(3, 2, dtype=torch.int32, device=device)
    merge_rows_(values, features, torch.ones(3, 0, device=device), 9)
    merge_rows_(values[:0], features[:0], torch.ones(0, 4, device=device), 9)
    merge_rows_(values[:, :0].contiguous(), features[:, :0].contiguous(), torch.ones(3, 4, device=device), 9)
    assert (values == 1).all()
    assert (features == 1).all()


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("C", [16, 100])
def test_with_a_spread_entries_count_as_what_they_are_at_least(C, levels, device):
    z, b, scale = products((6, 100), device, levels)
    spread = drawn_spread((6, 100), device)
    values = torch.zeros(6, 5, device=device)
    best = torch.full((6, 5), UNUSED, dtype=torch.int32, device=device)
    for start in range(0, 100, C):
        at = slice(start, start + C)
        here = Spread(*spread[:2], *(t[at].contiguous() for t in spread[2:]))
        merge_rows_(values, best, z[:, at].contiguous(), start, b[at].contiguous(), scale[at].contiguous(), here)
    for found, expected in zip((values, best), sorted_entries((z - spread_of(spread) + b).relu() * scale, 5)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("needed", [0, 1, 2**40])
def test_what_is_not_needed_is_not_done(needed, device):
    z, b, scale = products((6, 40), device)
    values = torch.zeros(6, 5, device=device)
    best = torch.full((6, 5), UNUSED, dtype=torch.int32, device=device)
    merge_rows_(values, best, z, 0, b, scale, needed=torch.tensor([needed], device=device))
    wanted = sorted_entries((z + b).relu() * scale, 5) if needed else (torch.zeros_like(values), UNUSED)
    assert torch.equal(values, wanted[0])
    assert (best == wanted[1]).all()


@pytest.mark.skipif(not GPU, reason="the interpreter never waits for a device")
def test_host_never_waits(device):
    z, b, scale = products((5, 77), device)
    values, features = streamed(z, 3, 77)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_rows_(values, features, z, 77, b, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(7, 4).t()}, "z must be"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"best_values": torch.ones(3, 2)}, "best_values must be"),
        ({"best_features": torch.ones(4, 2)}, "best_features must be"),
        ({"best_values": torch.ones(2, 4).t()}, "must be contiguous"),
        ({"features": torch.arange(6)}, "features must be"),
        ({"features": torch.ones(7)}, "features must be"),
        ({"needed": torch.ones(1)}, "needed must be"),
        ({"spread": Spread(*[torch.ones(4)] * 5)}, r"spread.of_norms must be contiguous torch.float32 \[7\]"),
        ({"z": torch.ones(4, MAX_CHUNK + 1)}, "chunks of at most"),
        ({"best_values": torch.ones(4, MAX_K + 1), "best_features": torch.ones(4, MAX_K + 1).int()}, "k of at most"),
    ],
)
def test_wrong_merge_arguments(change, message):
    best = {"best_values": torch.ones(4, 2), "best_features": torch.ones(4, 2).int()}
    with pytest.raises(ValueError, match=message):
        merge_rows_(**({**best, "z": torch.ones(4, 7), "features": 9} | change))
