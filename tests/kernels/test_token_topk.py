import pytest
import torch

pytest.importorskip("triton")

from kernel_makers import masked, products

from sampled_sae.kernels import configs
from sampled_sae.kernels.token_topk import keep_listed_, keep_rows_

pytestmark = pytest.mark.usefixtures("poisoned")

INF = float("inf")
GPU = torch.cuda.is_available()
# the interpreter holds rows of up to 64 in registers and reads longer ones in tiles of 32
SHAPES = [
    pytest.param((1, 1), id="one entry"),
    pytest.param((5, 64), id="full tile"),
    pytest.param((7, 37), id="tail"),
    pytest.param((4, 10_003 if GPU else 77), id="longer than registers"),
]


@pytest.mark.one_in(5)
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


@pytest.mark.skipif(not GPU, reason="the interpreter never waits for a device")
def test_host_never_waits(device):
    z, b, scale = products((5, 77), device)
    torch.cuda.set_sync_debug_mode("error")
    try:
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


def listed(counts, device, levels=None, seed=0):
    """values [N] > 0, some of them equal, of tokens with so many entries, and where each token's end."""
    make = torch.Generator().manual_seed(seed)
    values = torch.rand(sum(counts), generator=make) + 0.1
    if levels is not None:
        values = (levels * values).ceil()
    ends = torch.tensor([0, *counts]).cumsum(0)
    return values.to(device), ends.to(device)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_of_a_list_the_largest_of_each_token_stay(k, levels, device):
    """Tokens with fewer entries than k, as many and more; with none; with more than a program takes at once."""
    values, ends = listed([7, 0, 1, 40, 5, 100, 0, 16, 17], device, levels)
    expected = values.clone()
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        expected[start:end] = masked(values[None, start:end], k)[0]
    keep_listed_(values, ends, k)
    assert torch.equal(values, expected)


def test_listed_values_at_the_ends_of_float32_and_what_stands_behind(device):
    values = torch.tensor([1e-45, 3e38, INF, 2e-45, 1.0, float("nan"), 9.0, 9.0], device=device)
    keep_listed_(values, torch.tensor([0, 4, 6], device=device), 1)
    expected = torch.tensor([0.0, 0.0, INF, 0.0, 0.0, float("nan"), 9.0, 9.0], device=device)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_an_empty_list(device):
    keep_listed_(torch.zeros(0, device=device), torch.zeros(4, dtype=torch.int64, device=device), 3)
    keep_listed_(torch.ones(2, device=device), torch.zeros(1, dtype=torch.int64, device=device), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(4).double()}, "values must be"),
        ({"ends": torch.zeros(3)}, "ends must be"),
        ({"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_wrong_list_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        keep_listed_(**({"values": torch.ones(4), "ends": torch.tensor([0, 4]), "k": 1} | change))
