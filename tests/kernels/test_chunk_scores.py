import pytest
import torch
from kernel_makers import EPS, NEEDS_VIRTUAL_MEMORY, assert_runs_alone, statistics

pytest.importorskip("triton")

from sampled_sae.impl.triton import products, scores
from sampled_sae.kernels import configs
from sampled_sae.kernels.chunk_scores import chunk_partials, chunk_statistics, write_partials_

pytestmark = pytest.mark.usefixtures("poisoned")

SCORES = ["l2", "entropy", "uniform"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, C]; the interpreter's programs sum 2 tiles of 8 tokens x 32 features
SHAPES = [
    pytest.param((1, 1), id="one of each"),
    pytest.param((16, 32), id="one program"),
    pytest.param((67, 45), id="tails"),
    pytest.param((17, 252), id="tail of tokens"),
    pytest.param((531, 20), id="fold loops"),
]


def chunk(shape, device, seed=0):
    """z, b, scale, with one column that never fires and one that is zero everywhere."""
    make = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=make)
    b = torch.randn(shape[1], generator=make) / 2
    scale = torch.rand(shape[1], generator=make) + 0.5
    if shape[1] > 2:
        z[:, 1:3], b[1], b[2] = 0, -1, 0
    return z.to(device), b.to(device), scale.to(device)


def assert_close_to_float64(found, z, b, scale, score):
    """Activations are those of fp32; counts are exact, and sums within a few roundings of their terms."""
    a = z if b is None else z + b
    a = (a.relu() if scale is None else a.relu() * scale).double()
    expected = statistics(a, score)
    band = statistics(a, score)
    if score == "entropy":
        band = torch.stack([a.sum(0), (a * (1 + torch.where(a > 0, a, 1).log().abs())).sum(0)])
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    limit = 0 * band if score == "uniform" else 8 * EPS * band
    assert ((found.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_matches_float64(score, shape, device):
    z, b, scale = chunk(shape, device)
    assert_close_to_float64(chunk_statistics(z, b, scale, score), z, b, scale, score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, score, device):
    z, b, scale = chunk((67, 45), device)
    b, scale = b if has_bias else None, scale if has_scale else None
    assert_close_to_float64(chunk_statistics(z, b, scale, score), z, b, scale, score)


@pytest.mark.parametrize("score", SCORES)
def test_tokens_past_the_end_count_nothing(score, device):
    """A positive bias would fire on the rows that fill up the tile of tokens."""
    z, b = torch.zeros(1, 3, device=device), torch.full((3,), 2.0, device=device)
    assert_close_to_float64(chunk_statistics(z, b, None, score), z, b, None, score)


@pytest.mark.parametrize("score", SCORES)
def test_columns_that_never_fire_are_exactly_zero(score, device):
    z, b, scale = chunk((67, 45), device)
    assert (chunk_statistics(z, b, scale, score)[:, 1:3] == 0).all()


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_nan_is_not_hidden(score, device):
    z, b, scale = chunk((67, 45), device)
    z[40] = float("nan")
    assert chunk_statistics(z, b, scale, score).isnan().all()


@pytest.mark.parametrize("pad", [1, 16])
def test_rows_apart(pad, device):
    z, b, scale = chunk((67, 45), device)
    wide = torch.nn.functional.pad(z, (pad, pad), value=float("nan"))[:, pad:-pad]
    assert torch.equal(chunk_statistics(wide, b, scale, "entropy"), chunk_statistics(z, b, scale, "entropy"))


def test_l2_and_l2_squared_are_the_same_sums(device):
    z, b, scale = chunk((67, 45), device)
    assert torch.equal(chunk_statistics(z, b, scale, "l2"), chunk_statistics(z, b, scale, "l2_squared"))


def test_same_bits_every_run(device):
    z, b, scale = chunk((531, 45), device)
    first = chunk_statistics(z, b, scale, "entropy")
    assert torch.equal(chunk_statistics(z, b, scale, "entropy"), first)


@pytest.mark.parametrize(("score", "S"), [("l2", 1), ("entropy", 2), ("uniform", 1)])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape, score, S, device):
    found = chunk_statistics(torch.zeros(shape, device=device), None, None, score)
    assert torch.equal(found, torch.zeros(S, shape[1], device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "l1"}, "score must be one of"),
        ({"z": torch.ones(4, 5, dtype=torch.bfloat16)}, "z must be fp32"),
        ({"z": torch.ones(5, 4).t()}, "contiguous rows"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(5, 1)}, "scale must be"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"z": torch.ones(4, 5), "b": None, "scale": None, "score": "l2"}
    with pytest.raises(ValueError, match=message):
        chunk_statistics(**(arguments | change))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", [*SCORES, "l2_squared"])
def test_chunked_and_fused_scores_agree(score, dtype, device, monkeypatch):
    """Whole numbers: products, squares and sums of a are exact in any order; logarithms are not."""
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-2, 3, shape, generator=make).to(device, dtype) for shape in ((67, 20), (150, 20)))
    b = torch.randint(-2, 3, (150,), generator=make).float().to(device)
    scale = torch.randint(1, 3, (150,), generator=make).float().to(device)
    fused = scores.column_statistics(x, W, b, score, scale)
    seen = []
    monkeypatch.setattr(scores, "write_partials_", lambda *args: seen.append(args[0].shape) or write_partials_(*args))
    monkeypatch.setattr(configs, "LARGEST_FUSED_D", {(configs.architecture(x.device), 8 * dtype.itemsize): 19})
    monkeypatch.setattr(products, "NARROWEST", 64)
    monkeypatch.setattr(products, "WIDEST", 64)
    chunked = scores.column_statistics(x, W, b, score, scale)
    assert seen == [(67, 64), (67, 64), (67, 22)]
    torch.testing.assert_close(chunked, fused, rtol=1e-6 if score == "entropy" else 0, atol=0)


FAR_ROWS = """
import torch
from sampled_sae.kernels.chunk_scores import chunk_statistics
far = torch.empty_strided((3, 8), (2**30 + 16, 1))  # untouched pages cost nothing
far.copy_(torch.arange(24).reshape(3, 8))
assert torch.equal(chunk_statistics(far, None, None, "l2"), chunk_statistics(far.clone(), None, None, "l2"))
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR_ROWS, tmp_path)


def test_partials_of_another_width_are_refused(device):
    z = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match=r"partials must be \[S, T, 8\]"):
        write_partials_(z, None, None, "l2", chunk_partials(3, 9, "l2", z.device))
