import pytest
import torch
from kernel_makers import EPS, FAR, NEEDS_VIRTUAL_MEMORY, assert_runs_alone, integers, statistics

pytest.importorskip("triton")

import triton.language as tl

from sampled_sae.kernels import configs, descriptors
from sampled_sae.kernels.column_scores import column_statistics

pytestmark = pytest.mark.usefixtures("poisoned")

SCORES = ["l2", "entropy", "uniform"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, d, F]; the interpreter's tiles are 32 tokens x 16 dimensions x 16 features, in groups of 8
SHAPES = [
    pytest.param((1, 1, 1), id="one of each"),
    pytest.param((32, 16, 16), id="one tile"),
    pytest.param((67, 37, 45), id="tails"),
    pytest.param((33, 17, 252), id="tail of groups"),
    pytest.param((1061, 16, 20), id="fold loops"),
]


def inputs(shape, dtype, device, seed=0):
    """x, W, b, scale, with one column that never fires and one that is zero everywhere."""
    B, d, F = shape
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(B, d, generator=make)
    W = torch.randn(F, d, generator=make) / d**0.5
    b = torch.randn(F, generator=make) / 2
    scale = torch.rand(F, generator=make) + 0.5
    if F > 2:
        W[1:3], b[1], b[2] = 0, -1, 0
    return x.to(device, dtype), W.to(device, dtype), b.to(device), scale.to(device)


@pytest.fixture(params=["pointers", "descriptors"])
def form(request, monkeypatch):
    """How operands of 16 bits come whose rows are `apart`; on a GPU without tensor descriptors always by pointers."""
    if request.param == "pointers":
        monkeypatch.setattr(descriptors, "DESCRIBED", {})
    return request.param


def apart(matrix):
    """The same in rows that begin at multiples of 16 bytes, with NaN between them."""
    columns = -matrix.shape[1] % (16 // matrix.itemsize) + 16 // matrix.itemsize
    return torch.nn.functional.pad(matrix, (0, columns), value=float("nan"))[:, : matrix.shape[1]]


def exact(x, W, b, score, scale):
    """Statistics in float64, and the band that fp32 rounding may move them in.

    A value of a is known to about 4 EPS of the sum m of the magnitudes of its terms; a count may move by the
    number of entries which are that close to 0.
    """
    x, W = x.double(), W.double()
    b = torch.zeros_like(W[:, 0]) if b is None else b.double()
    scale = torch.ones_like(b) if scale is None else scale.double()
    z = x @ W.t() + b
    m = (x.abs() @ W.abs().t() + b.abs()) * scale
    expected = statistics(z.relu() * scale, score)
    if score == "entropy":
        band = 4 * EPS * torch.stack([m.sum(0), (m * (1 + m.log().abs().nan_to_num(posinf=0))).sum(0)])
    elif score == "uniform":
        band = ((z * scale).abs() <= 4 * EPS * m).sum(0, keepdim=True) * (m.amax(0) > 0)
    else:
        band = 4 * EPS * m.square().sum(0, keepdim=True)
    return expected, band


def eager(x, W, b, score, scale):
    """What PyTorch gives in the dtype of x."""
    z = torch.nn.functional.linear(x, W, None if b is None else b.to(x.dtype)).relu()
    return statistics(z if scale is None else z * scale.to(x.dtype), score)


def assert_no_worse_than_eager(x, W, b, score, scale, laid_out=lambda matrix: matrix):
    """Ours must stay within fp32 rounding whatever the dtype, so also within eager's error plus that band."""
    found = column_statistics(laid_out(x), laid_out(W), b, score, scale)
    expected, band = exact(x, W, b, score, scale)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    eager_error = (eager(x, W, b, score, scale).double() - expected).abs()
    assert (error <= band).all(), f"error beyond fp32 rounding by {(error - band).max():.3g}"
    assert (error.amax(1) <= eager_error.amax(1) + band.amax(1)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_matches_float64(score, shape, device):
    x, W, b, scale = inputs(shape, torch.float32, device)
    assert_no_worse_than_eager(x, W, b, score, scale)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_16_bits_match_float64(score, dtype, shape, device, form):
    x, W, b, scale = inputs(shape, dtype, device)
    assert_no_worse_than_eager(x, W, b, score, scale, apart)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_optional_arguments(has_bias, has_scale, score, device):
    x, W, b, scale = inputs((67, 37, 45), torch.float32, device)
    assert_no_worse_than_eager(x, W, b if has_bias else None, score, scale if has_scale else None)


@pytest.mark.parametrize("score", SCORES)
def test_vectors_of_another_dtype(score, device):
    x, W, b, scale = inputs((67, 37, 45), torch.bfloat16, device)
    assert_no_worse_than_eager(x, W, b.bfloat16(), score, scale.half())


def test_l2_and_l2_squared_are_the_same_sums(device):
    x, W, b, scale = inputs((67, 37, 45), torch.float32, device)
    assert torch.equal(column_statistics(x, W, b, "l2", scale), column_statistics(x, W, b, "l2_squared", scale))


@pytest.mark.parametrize("score", SCORES)
def test_rows_past_the_end_count_nothing(score, device):
    """A positive bias would fire on the 31 rows that fill up the tile of tokens."""
    x, W = torch.zeros(1, 5, device=device), torch.zeros(3, 5, device=device)
    found = column_statistics(x, W, torch.full((3,), 2.0, device=device), score)
    expected = statistics(torch.full((1, 3), 2.0, device=device), score)
    torch.testing.assert_close(found, expected, rtol=EPS, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_columns_that_never_fire_are_exactly_zero(score, dtype, device):
    x, W, b, scale = inputs((67, 37, 45), dtype, device)
    assert (column_statistics(x, W, b, score, scale)[:, 1:3] == 0).all()


def test_entropy_of_subnormal_activations_is_finite(device):
    x, W = torch.full((40, 4), 1e-22, device=device), torch.full((3, 4), 1e-20, device=device)
    found = column_statistics(x, W, None, "entropy")
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-35)


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_nan_is_not_hidden(score, device):
    x, W, b, _ = inputs((67, 37, 45), torch.float32, device)
    x[40, 3] = float("nan")
    assert column_statistics(x, W, b, score).isnan().all()


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "every second", "unaligned"])
def test_strided_x_and_W(layout, device):
    x, W, b, scale = inputs((67, 37, 45), torch.float32, device)
    views = {
        "rows apart": lambda t: torch.nn.functional.pad(t, (0, 60), value=float("nan"))[:, :37],
        "transposed": lambda t: t.t().contiguous().t(),
        "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "unaligned": lambda t: torch.nn.functional.pad(t, (1, 0))[:, 1:],
    }
    other_x = views[layout](x)
    other_W = views[layout](W) if layout in ("rows apart", "unaligned") else W
    assert torch.equal(other_x, x)
    assert not other_x.is_contiguous()
    expected = column_statistics(x, W, b, "l2", scale)
    assert torch.equal(column_statistics(other_x, other_W, b, "l2", scale), expected)


@pytest.mark.parametrize("score", SCORES)
def test_sums_of_two_batches_add_up(score, device):
    x, W, b, scale = inputs((67, 37, 45), torch.float32, device)
    parts = [column_statistics(part, W, b, score, scale) for part in (x[:29], x[29:])]
    torch.testing.assert_close(parts[0] + parts[1], column_statistics(x, W, b, score, scale), rtol=1e-5, atol=1e-5)


def test_same_bits_every_run(device):
    x, W, b, scale = inputs((123, 50, 45), torch.bfloat16, device)
    first = column_statistics(x, W, b, "entropy", scale)
    assert torch.equal(column_statistics(x, W, b, "entropy", scale), first)


def test_no_gradient(device):
    x, W, b, scale = (t.requires_grad_() for t in inputs((32, 16, 16), torch.float32, device))
    assert not column_statistics(x, W, b, "l2", scale).requires_grad


def test_both_forms_see_the_same_nan_ties_and_tails(form, device):
    """Whole numbers, so that sums are exact: of 67 tokens, which fill two tiles and three rows of a third."""
    x, W, b, scale = integers((67, 40, 45), torch.bfloat16, device)
    a = (x.float() @ W.float().t() + b).relu() * scale
    assert torch.equal(column_statistics(apart(x), apart(W), b, "l2", scale), a.square().sum(0, keepdim=True))
    x[66, 39] = float("nan")
    assert column_statistics(apart(x), apart(W), b, "l2", scale).isnan().all()


@pytest.mark.parametrize(("score", "S"), [("l2", 1), ("entropy", 2), ("uniform", 1)])
def test_empty_batch(score, S, device):
    found = column_statistics(torch.zeros(0, 7, device=device), torch.ones(5, 7, device=device), None, score)
    assert torch.equal(found, torch.zeros(S, 5, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "l1"}, "score must be one of"),
        ({"x": torch.ones(4, 6)}, r"x \[B, d\] and W \[F, d\]"),
        ({"x": torch.ones(4, 7, dtype=torch.float64)}, "fp32, bf16 or fp16"),
        ({"W": torch.ones(7, 5).t()}, "pass W_enc.t"),
        ({"b": torch.ones(4)}, "b must be"),
        ({"scale": torch.ones(5, 1)}, "scale must be"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"x": torch.ones(4, 7), "W": torch.ones(5, 7), "b": None, "score": "l2", "scale": None}
    with pytest.raises(ValueError, match=message):
        column_statistics(**(arguments | change))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_architecture(capability, arch, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda")) == arch
    for dtype in DTYPES:
        found = tuple(configs.column_scores_config(arch, dtype, d) for d in (768, 4096))
        assert found == configs.COLUMN_SCORES[arch, 8 * dtype.itemsize]


def test_architecture_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="or newer"):
        configs.architecture(torch.device("cuda"))
    with pytest.raises(ValueError, match="tensors on a GPU, or TRITON_INTERPRET=1"):
        configs.architecture(torch.device("cpu"))


FAR_ROWS = """
from sampled_sae.kernels.column_scores import column_statistics
expected = column_statistics(near, near, None, "l2")
assert torch.equal(column_statistics(far, near, None, "l2"), expected)
assert torch.equal(column_statistics(near, far, None, "l2"), expected)
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR + FAR_ROWS, tmp_path)
