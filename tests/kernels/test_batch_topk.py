import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_makers import products

from sampled_sae.kernels import configs
from sampled_sae.kernels.batch_topk import compact_largest, keep_largest_, largest_indices
from sampled_sae.kernels.radix import span_of_program

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
GPU = torch.cuda.is_available()
# the interpreter's spans are 64 entries x 1, 2, 4, ... tiles, at most 4 of them
SHAPES = [
    pytest.param((1, 1), id="one entry"),
    pytest.param((8, 8), id="one tile"),
    pytest.param((13, 11), id="tail"),
    pytest.param((300, 16001) if GPU else (33, 29), id="spans of several tiles"),
]


def masked(a, n):
    """The n largest positive entries of a, by a stable sort: ties to the lower index."""
    order = a.flatten().sort(descending=True, stable=True).indices[:n]
    kept = torch.zeros_like(a.flatten()).index_fill_(0, order, 1).view_as(a) * (a > 0)
    return torch.where(kept > 0, a, 0.0)


def budgets(a):
    positive = int((a > 0).sum())
    found = {1, a.numel() // 7, a.numel() // 3, positive - 1, positive, positive + 1, a.numel() - 1}
    return sorted(n for n in found if 0 < n < a.numel())


@pytest.mark.one_in(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_keeps_the_largest(levels, shape, device):
    z, b, scale = products(shape, device, levels)
    a = (z + b).relu() * scale
    for n in [0, *budgets(a), a.numel(), a.numel() + 3]:
        found = z.clone()
        keep_largest_(found, n, b, scale)
        assert torch.equal(found, masked(a, n)), n


@pytest.mark.parametrize("n", [1, 63, 64, 65, 256, 257, 600, 956])
def test_ties_go_to_the_lower_index(n, device):
    """All entries are equal: the ties run out inside a tile, at its end, at the end of a span."""
    found = torch.full((33, 29), 0.75, device=device)
    keep_largest_(found, n)
    expected = torch.zeros(33 * 29, device=device)
    expected[:n] = 0.75
    assert torch.equal(found.flatten(), expected)


def test_values_that_differ_in_the_last_bits(device):
    """Cuts that are told apart by the last digit alone, or by each of the others."""
    bits = 0x3F800000 + torch.randperm(450, generator=torch.Generator().manual_seed(0))
    bits[:150] += 1 << 16
    bits[150:300] += 1 << 24
    a = bits.to(torch.int32).view(torch.float32).view(30, 15).to(device)
    for n in (1, 150, 151, 200, 300, 301, 449):
        found = a.clone()
        keep_largest_(found, n)
        assert torch.equal(found, masked(a, n)), n


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("n", [40, 10**6])
def test_optional_arguments(n, has_bias, has_scale, device):
    z, b, scale = products((13, 37), device)
    b, scale = b.bfloat16() if has_bias else None, scale.half() if has_scale else None
    a = (z + (0 if b is None else b.float())).relu() * (1 if scale is None else scale.float())
    keep_largest_(z, n, b, scale)
    assert torch.equal(z, masked(a, n))


@pytest.mark.parametrize("n", [0, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copy_is_the_rounded_result(dtype, n, device):
    z, b, scale = products((13, 37), device)
    copy = torch.empty(13, 37, dtype=dtype, device=device)
    keep_largest_(z, n, b, scale, copy=copy)
    assert torch.equal(copy, z.to(dtype))


@pytest.mark.parametrize("n", [1, 40, 300, 481, 10**6])
@pytest.mark.parametrize("before", [INF, 2.0**-100])
def test_the_smallest_that_is_kept(before, n, device):
    """Of fewer positive entries than n too, and beside a NaN, which is kept."""
    z, b, scale = products((13, 37), device)
    z[5, 4] = float("nan")
    least = torch.full((1,), before, device=device)
    keep_largest_(z, n, b, scale, least=least)
    positive = z[z > 0]
    assert least.item() == min(before, positive.min().item() if len(positive) else INF)


@pytest.mark.parametrize("n", [0, 3, 10**6])
def test_where_nothing_is_kept_nothing_is_smallest(n, device):
    for z in (-torch.rand(13, 37, device=device), torch.zeros(0, 5, device=device)):
        least = torch.full((1,), INF, device=device)
        keep_largest_(z, n, least=least)
        assert least.item() == INF


@pytest.mark.parametrize("n", [3, 10**6])
def test_nothing_positive(n, device):
    z = -torch.rand(13, 37, device=device)
    z[0, :4] = -0.0
    keep_largest_(z, n)
    assert torch.equal(z, torch.zeros_like(z))
    assert not z.signbit().any()


@pytest.mark.parametrize("n", [40, 10**6])
def test_nan_is_not_hidden(n, device):
    z, b, scale = products((13, 37), device)
    z[5, 4] = INF
    expected = masked((z + b).relu() * scale, n)
    z[5, 4] = float("nan")
    keep_largest_(z, n, b, scale)
    assert z[5, 4].isnan()
    expected[5, 4] = float("nan")
    torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)


def test_unaligned_block(device):
    z, b, scale = products((13, 37), device)
    other = torch.nn.functional.pad(z.flatten(), (1, 0))[1:].view(13, 37)
    keep_largest_(z, 100, b, scale)
    keep_largest_(other, 100, b, scale)
    assert torch.equal(other, z)


def test_same_bits_every_run(device):
    z, b, scale = products((33, 29), device)
    results = [z.clone() for _ in range(2)]
    for result in results:
        keep_largest_(result, 200, b, scale)
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_block(shape, device):
    keep_largest_(torch.zeros(shape, device=device), 3)


@pytest.mark.parametrize("F", [1, 64, 77, 100_003 if GPU else 500])
@pytest.mark.parametrize("levels", [None, 3])
def test_largest_indices(levels, F, device):
    scores = torch.randn(F, generator=torch.Generator().manual_seed(F)).relu()
    if levels is not None:
        scores = (scores * levels).round()
    scores = scores.to(device)
    for size in {0, 1, F // 5, 2 * F // 3, F - 1, F, F + 1}:
        found = largest_indices(scores, size)
        expected = scores.sort(descending=True, stable=True).indices[:size].sort().values
        assert found.dtype == torch.int64
        assert torch.equal(found, expected), size


def test_zeros_enter_in_order_when_the_positives_are_in(device):
    scores = torch.zeros(300, device=device)
    scores[[7, 250]] = 1.0
    scores[1] = -0.0
    assert largest_indices(scores, 5).tolist() == [0, 1, 2, 7, 250]
    assert largest_indices(torch.zeros(300, device=device), 4).tolist() == [0, 1, 2, 3]


def entries(N, n_tokens, n_features, device, levels=None, padding=0):
    """values and ascending keys of N entries, the last `padding` of which are 0 with a key of -1."""
    make = torch.Generator().manual_seed(N)
    values = torch.rand(N, generator=make) + 0.5
    if levels is not None:
        values = (values * levels).round() / levels
    keys = torch.randint(n_tokens * n_features, (N,), generator=make).sort().values
    values[N - padding :], keys[N - padding :] = 0, -1
    return values.to(device), keys.to(device)


def compacted(values, keys, n, n_tokens, n_features):
    order = values.sort(descending=True, stable=True).indices[:n]
    order = order[values[order] > 0].sort().values
    unused = n - len(order)
    pad = torch.nn.functional.pad
    return (
        pad(values[order], (0, unused)),
        pad(keys[order] // n_features, (0, unused), value=n_tokens).int(),
        pad(keys[order] % n_features, (0, unused), value=n_features).int(),
    )


@pytest.mark.one_in(5)
@pytest.mark.parametrize("sizes", [(9, 7), (70_000, 50_000)], ids=["narrow keys", "wide keys"])
@pytest.mark.parametrize("padding", [0, 41])
@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("N", [50, 5_000_000 if GPU else 500])
def test_compact_largest(N, levels, padding, sizes, device):
    values, keys = entries(N, *sizes, device, levels, padding)
    for n in (0, 1, N // 3, N - padding, N + 150):
        found = compact_largest(values, keys, n, *sizes)
        expected = compacted(values, keys, n, *sizes)
        for f, e in zip(found, expected):
            assert f.dtype == e.dtype
            assert torch.equal(f, e), n


@pytest.mark.parametrize("N", [0, 70])
def test_compact_without_entries(N, device):
    keys = torch.zeros(N, dtype=torch.int64, device=device)
    values, tokens, features = compact_largest(torch.zeros(N, device=device), keys, 5, 3, 8)
    assert values.tolist() == [0] * 5
    assert tokens.tolist() == [3] * 5
    assert features.tolist() == [8] * 5


@pytest.mark.skipif(not GPU, reason="the interpreter never waits for a device")
def test_host_never_waits(device):
    z, b, scale = products((13, 37), device)
    values, keys = entries(700, 9, 7, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_largest_(z, 40, b, scale)
        largest_indices(values, 40)
        compact_largest(values, keys, 40, 9, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_interpreter_reaches_every_path():
    """Spans of several tiles, several spans: without them, ties across programs are never settled."""
    config = configs.radix_config("interpreter").kwargs
    assert config["BLOCK"] * config["SPANS"] * 2 < 33 * 29


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(4, 7, dtype=torch.float64)}, "z must be"),
        ({"z": torch.ones(7, 4).t()}, "z must be"),
        ({"z": torch.ones(28)}, "z must be"),
        ({"n": -1}, "n must be"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(5, 1)}, "scale must be"),
        ({"copy": torch.ones(4, 7)}, "copy must be"),
        ({"copy": torch.ones(4, 6).bfloat16()}, "copy must be"),
        ({"least": torch.ones(2)}, "least must be"),
    ],
)
def test_wrong_block_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        keep_largest_(**({"z": torch.ones(4, 7), "n": 3} | change))


def test_wrong_list_arguments():
    values, keys = torch.ones(4), torch.arange(4)
    with pytest.raises(ValueError, match="scores must be"):
        largest_indices(values.double(), 2)
    with pytest.raises(ValueError, match="size must be"):
        largest_indices(values, -1)
    with pytest.raises(ValueError, match="values must be"):
        compact_largest(values.view(2, 2), keys, 2, 2, 2)
    with pytest.raises(ValueError, match="keys must be"):
        compact_largest(values, keys.int(), 2, 2, 2)
    with pytest.raises(ValueError, match="n must be"):
        compact_largest(values, keys, -1, 2, 2)


@triton.jit
def offsets_kernel(starts, counts, N, TILES: tl.constexpr, BLOCK: tl.constexpr):
    start, n = span_of_program(N, TILES, BLOCK)
    tl.store(starts + tl.program_id(0), start)
    tl.store(counts + tl.program_id(0), n)


def test_offsets_of_more_entries_than_32_bits_count(device):
    starts = torch.zeros(5, dtype=torch.int64, device=device)
    counts = torch.zeros(5, dtype=torch.int32, device=device)
    offsets_kernel[(5,)](starts, counts, 2**32 + 7, TILES=2**20, BLOCK=2**10)
    assert starts.tolist() == [i * 2**30 for i in range(5)]
    assert counts.tolist() == [2**30] * 4 + [7]
