import pytest
import torch

pytest.importorskip("triton")

from sampled_sae.kernels.needed_product import product_if_

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, d, C; the interpreter's tiles are 16 features x 32 tokens, and 16 of d
SHAPES = [
    pytest.param((1, 1, 1), id="one of each"),
    pytest.param((32, 16, 16), id="one tile"),
    pytest.param((45, 37, 75), id="tails"),
]


def flag(value, device):
    return torch.tensor([value], device=device)


def whole(rows, d, dtype, device, seed):
    make = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, d), generator=make).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("listed_features", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_of_a_chunk(shape, listed_features, dtype, device):
    B, d, C = shape
    x, W = whole(B, d, dtype, device, 0), whole(2 * C + 1, d, dtype, device, 1)
    features = torch.arange(C, device=device) * 2 + 1 if listed_features else C
    rows = W[features] if listed_features else W[C : 2 * C]
    z = torch.full((B * C + 3,), -7.0, device=device)
    product_if_(flag(2**40, device), x, W, features, z[: B * C].view(B, C))
    assert torch.equal(z[: B * C].view(B, C), x.float() @ rows.float().t())
    assert (z[B * C :] == -7).all()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("has_floors", [True, False])
def test_optional_arguments(has_floors, has_scale, has_bias, device):
    """Written into a part of longer rows."""
    B, d, C = 45, 20, 30
    x, W = whole(B, d, torch.float32, device, 0), whole(C, d, torch.float32, device, 1)
    vectors = torch.arange(C, device=device)
    b = vectors % 5 - 2.0 if has_bias else None
    scale = vectors % 3 + 1.0 if has_scale else None
    floors = 2.0 * (vectors % 7) if has_floors else None
    out = torch.full((B, C + 9), -7.0, device=device)
    product_if_(flag(1, device), x, W, 0, out[:, 4:-5], b, scale, floors)
    expected = (x @ W.t() + (b if has_bias else 0)) * (scale if has_scale else 1)
    if has_floors:
        expected *= expected > floors
    assert torch.equal(out[:, 4:-5], expected)
    assert (out[:, :4] == -7).all()
    assert (out[:, -5:] == -7).all()


def test_what_is_not_needed_is_not_written(device):
    z = torch.full((45, 75), -7.0, device=device)
    product_if_(flag(0, device), torch.ones(45, 8, device=device), torch.ones(75, 8, device=device), 0, z)
    assert (z == -7).all()


@pytest.mark.parametrize("pad", [1, 16])
def test_rows_apart(pad, device):
    x, W = whole(45, 20, torch.float32, device, 0), whole(30, 20, torch.float32, device, 1)
    apart = (torch.nn.functional.pad(t, (pad, pad), value=float("nan"))[:, pad:-pad] for t in (x, W))
    z = torch.empty(45, 30, device=device)
    product_if_(flag(1, device), *apart, 0, z)
    assert torch.equal(z, x @ W.t())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape, device):
    x = torch.ones(shape[0], 4, device=device)
    product_if_(flag(1, device), x, torch.ones(9, 4, device=device), 0, torch.empty(shape, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needed": torch.ones(1)}, "needed must be"),
        ({"W": torch.ones(9, 3)}, r"x \[B, d\] and W \[F, d\] expected"),
        ({"W": torch.ones(9, 2).half()}, "must both be"),
        ({"features": torch.arange(4)}, r"features must be contiguous torch.int64 \[5\]"),
        ({"features": 5}, "features from 5 on: W has 9, 5 are asked for"),
        ({"features": -1}, "features from -1 on"),
        ({"z": torch.ones(5, 4).t()}, "contiguous rows"),
        ({"z": torch.ones(3, 5)}, r"a row for each of 4 tokens, got \[3, 5\]"),
        ({"b": torch.ones(9)}, "b must be"),
        ({"floors": torch.ones(9)}, r"floors must be contiguous torch.float32 \[5\]"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "needed": torch.ones(1, dtype=torch.int64),
        "x": torch.ones(4, 2),
        "W": torch.ones(9, 2),
        "features": 2,
        "z": torch.ones(4, 5),
    }
    with pytest.raises(ValueError, match=message):
        product_if_(**(arguments | change))
