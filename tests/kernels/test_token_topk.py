import pytest
import torch

pytest.importorskip("triton")

from kernel_makers import products

from sampled_sae.kernels import configs
from sampled_sae.kernels.token_topk import MAX_CHUNK, MAX_K, keep_rows_, merge_rows_

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
UNUSED = 2**31 - 1
GPU = torch.cuda.is_available()
# the interpreter holds rows of up to 64 in registers and reads longer ones in tiles of 32
SHAPES = [
    pytest.param((1, 1), id="one entry"),
    pytest.param((5, 64), id="full tile"),
    pytest.param((7, 37), id="tail"),
    pytest.param((4, 10_003 if GPU else 77), id="longer than registers"),
]


def masked(a, k):
    """The k largest positive entries of each row, by a stable sort: ties to the lower column."""
    order = a.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(a).scatter_(1, order, 1) * (a > 0)
    return torch.where(kept > 0, a, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_keeps_the_largest_of_each_row(levels, shape, device):
    z, b, scale = products(shape, device, levels)
    a = (z + b).relu() * scale
    for k in {0, 1, 2, shape[1] // 7, shape[1] // 3, shape[1] - 1, shape[1], shape[1] + 3}:
        found = z.clone()
        keep_rows_(found, k, b, scale)
        assert torch.equal(found, masked(a, k)), k


@pytest.mark.parametrize("P", [64, 77])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 63])
def test_ties_go_to_the_lower_column(k, P, device):
    """Some entries are above the cut, all others equal to it: the ties run out inside a tile and at its end."""
    z = torch.full((2, P), 0.75, device=device)
    z[1, 40:45] = 1.5
    expected = masked(z, k)
    keep_rows_(z, k)
    assert torch.equal(z, expected)


@pytest.mark.parametrize("P", [50, 90])
def test_values_that_differ_in_the_last_bits(P, device):
    """Cuts that are told apart by the last bits alone, and small values far below the largest."""
    bits = 0x3F800000 + torch.randperm(P, generator=torch.Generator().manual_seed(0))
    bits[: P // 2] -= 1 << 29
    a = bits.to(torch.int32).view(torch.float32)[None].to(device)
    for k in (1, P // 4, P // 2, P // 2 + 1, P - 5):
        found = a.clone()
        keep_rows_(found, k)
        assert torch.equal(found, masked(a, k)), k


@pytest.mark.parametrize("P", [37, 77])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, P, device):
    z, b, scale = products((5, P), device)
    b, scale = b.bfloat16() if has_bias else None, scale.half() if has_scale else None
    a = (z + (0 if b is None else b.float())).relu() * (1 if scale is None else scale.float())
    keep_rows_(z, 6, b, scale)
    assert torch.equal(z, masked(a, 6))


@pytest.mark.parametrize("P", [37, 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copy_is_the_rounded_result(dtype, P, device):
    z, b, scale = products((5, P), device)
    copy = torch.empty(5, P, dtype=dtype, device=device)
    keep_rows_(z, 6, b, scale, copy=copy)
    assert torch.equal(copy, z.to(dtype))


@pytest.mark.parametrize("P", [37, 77])
def test_nothing_positive(P, device):
    z = -torch.rand(5, P, device=device)
    z[0, :4] = -0.0
    keep_rows_(z, 6)
    assert torch.equal(z, torch.zeros_like(z))
    assert not z.signbit().any()


@pytest.mark.parametrize("P", [37, 77])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=["quiet", "as GPUs make it", "negative"])
def test_nan_is_the_largest(bits, P, device):
    z, b, scale = products((5, P), device)
    z[2, 4] = INF
    expected = masked((z + b).relu() * scale, 6)
    z[2, 4] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    expected[2, 4] = float("nan")
    keep_rows_(z, 6, b, scale)
    torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("P", [37, 77])
def test_unaligned_rows_and_same_bits(P, device):
    z, b, scale = products((5, P), device)
    other = torch.nn.functional.pad(z.flatten(), (1, 0))[1:].view(5, P)
    keep_rows_(z, 6, b, scale)
    keep_rows_(other, 6, b, scale)
    assert torch.equal(other, z)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_block(shape, device):
    keep_rows_(torch.zeros(shape, device=device), 3)


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


@pytest.mark.skipif(not GPU, reason="the interpreter never waits for a device")
def test_host_never_waits(device):
    z, b, scale = products((5, 77), device)
    values, features = streamed(z, 3, 77)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_rows_(values, features, z, 77, b, scale)
        keep_rows_(z, 6, b, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_rows_fit_their_configuration(arch):
    for P in (1, 512, 513, 4096, 8192):
        assert P <= configs.rows_config(arch, P).kwargs["BP"] < 2 * P
    assert configs.rows_config(arch, 8193) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(4, 7, dtype=torch.bfloat16)}, "z must be"),
        ({"z": torch.ones(7, 4).t()}, "z must be"),
        ({"k": -1}, "k must be"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(14)[::2]}, "scale must be"),
        ({"copy": torch.ones(7, 4).half().t()}, "copy must be"),
    ],
)
def test_wrong_block_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        keep_rows_(**({"z": torch.ones(4, 7), "k": 3} | change))


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
        ({"z": torch.ones(4, MAX_CHUNK + 1)}, "chunks of at most"),
        ({"best_values": torch.ones(4, MAX_K + 1), "best_features": torch.ones(4, MAX_K + 1).int()}, "k of at most"),
    ],
)
def test_wrong_merge_arguments(change, message):
    best = {"best_values": torch.ones(4, 2), "best_features": torch.ones(4, 2).int()}
    with pytest.raises(ValueError, match=message):
        merge_rows_(**({**best, "z": torch.ones(4, 7), "features": 9} | change))
