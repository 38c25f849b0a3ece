from itertools import pairwise

import pytest
import torch
from kernel_makers import FAR, NEEDS_VIRTUAL_MEMORY, assert_runs_alone, assert_within_rounding, matrix

pytest.importorskip("triton")

from sampled_sae.kernels import gather_decode
from sampled_sae.kernels.gather_decode import entry_dots, gather_sum

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, d, F]; the interpreter takes 16 of d, sums 4 entries at once and 16 in a piece, and has 8 dots in a program;
# a GPU's blocks are 16 times as large, and there so are d and F
SHAPES = [
    pytest.param((1, 1, 1), id="one of each"),
    pytest.param((8, 16, 8), id="one tile"),
    pytest.param((11, 37, 150), id="tails"),
    pytest.param((5, 48, 33), id="tiles of d"),
]
NOWHERE = 2**31 - 1


def scaled(shape, device):
    B, d, F = shape
    return (B, 16 * d, 16 * F) if device == "cuda" else shape


def entries(B, F, device, unused=5, seed=0):
    """(values, tokens, features, token_ends): some tokens empty, one with every feature, and unused slots.

    The unused slots hold NaN and an index that is nowhere, worse than the sentinels 0, B and F.
    """
    make = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, min(F, 20) + 1, (B,), generator=make)
    counts[B // 2 :: 3] = 0
    counts[0] = F
    features = [torch.randperm(F, generator=make)[:count].sort().values for count in counts.tolist()]
    n = int(counts.sum())
    values = torch.cat((torch.randn(n, generator=make), torch.full((unused,), float("nan"))))
    nowhere = torch.full((unused,), NOWHERE)
    tokens = torch.cat((torch.arange(B).repeat_interleave(counts), nowhere)).int()
    features = torch.cat((*features, nowhere)).int()
    token_ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return tuple(t.to(device) for t in (values, tokens, features, token_ends))


def dense(values, tokens, features, token_ends, F):
    """The entries in a float64 [B, F]."""
    n = int(token_ends[-1])
    full = torch.zeros(len(token_ends) - 1, F, dtype=torch.float64, device=values.device)
    full[tokens[:n].long(), features[:n].long()] = values[:n].double()
    return full


def check_sum(given, W, bias):
    values, _, features, token_ends = given
    codes, rows = dense(*given, len(W)), W.double()
    bias64 = torch.zeros_like(rows[0]) if bias is None else bias.double()
    found = gather_sum(values, features, token_ends, W, bias)
    assert_within_rounding(found, codes @ rows + bias64, codes.abs() @ rows.abs() + bias64.abs())


def check_dots(given, left, W):
    _, tokens, features, token_ends = given
    n = int(token_ends[-1])
    terms = left.double()[tokens[:n].long()] * W.double()[features[:n].long()]
    unused = (0, len(tokens) - n)
    expected, magnitude = (torch.nn.functional.pad(t.sum(1), unused) for t in (terms, terms.abs()))
    assert_within_rounding(entry_dots(left, W, tokens, features, token_ends), expected, magnitude)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dots_by_stripes_of_d(shape, dtype, device, monkeypatch):
    """As where W is larger than L2: of one stripe, of several, and with a tail."""
    monkeypatch.setattr(gather_decode, "FITS_L2", 0)
    B, d, F = scaled(shape, device)
    given = entries(B, F, device)
    check_dots(given, matrix(B, d, dtype, device), matrix(F, d, dtype, device, seed=2))


@pytest.mark.parametrize("skipped", [1, 16, 37])
def test_entries_before_the_first_token_are_left_out(skipped, device):
    """token_ends[0] > 0, to within a piece, to its end and over several; what lies before token_ends is not read."""
    B, d, F = scaled((11, 37, 150), device)
    values, _, features, token_ends = entries(B, F, device)
    W = matrix(F, d, torch.float32, device)
    pad = (skipped, 0)
    shifted = torch.nn.functional.pad(values, pad, value=float("nan")), torch.nn.functional.pad(features, pad)
    ends = torch.full((B + 2,), -(2**31) + 1, dtype=torch.int32, device=device)
    ends[1:] = token_ends + skipped
    found = gather_sum(*shifted, ends[1:], W)
    torch.testing.assert_close(found, gather_sum(values, features, token_ends, W), rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_sum_matches_float64(has_bias, dtype, shape, device):
    B, d, F = scaled(shape, device)
    bias = matrix(1, d, dtype, device, seed=2)[0] if has_bias else None
    check_sum(entries(B, F, device), matrix(F, d, dtype, device), bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots_match_float64(dtype, shape, device):
    B, d, F = scaled(shape, device)
    check_dots(entries(B, F, device), matrix(B, d, dtype, device), matrix(F, d, dtype, device, seed=2))


@pytest.mark.parametrize(("left", "right"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_dots_of_two_dtypes(left, right, device):
    check_dots(entries(11, 45, device), matrix(11, 37, left, device), matrix(45, 37, right, device, seed=2))


def test_bias_of_another_dtype(device):
    check_sum(entries(11, 45, device), matrix(45, 37, torch.bfloat16, device), matrix(1, 37, torch.float16, device)[0])


def test_sum_is_the_sum_of_rows(device):
    """The equivalence in the docstring, where it is exact: small integers."""
    values, _, features, token_ends = entries(11, 45, device, unused=0)
    values, W = values.mul(4).round(), matrix(45, 37, torch.float32, device).mul(4).round()
    parts = [values[s:e] @ W[features[s:e].long()] for s, e in pairwise(token_ends.tolist())]
    assert torch.equal(gather_sum(values, features, token_ends, W), torch.stack(parts))


@pytest.mark.parametrize("unused", [0, 1, 40])
def test_unused_slots(unused, device):
    given = entries(6, 45, device, unused)
    W = matrix(45, 37, torch.float32, device)
    check_sum(given, W, None)
    check_dots(given, matrix(6, 37, torch.float32, device, seed=2), W)


def test_every_slot_unused(device):
    _, tokens, features, _ = entries(1, 20, device)
    values, token_ends = (
        torch.full((25,), float("nan"), device=device),
        torch.zeros(4, dtype=torch.int32, device=device),
    )
    tokens[:], features[:] = NOWHERE, NOWHERE
    W, bias = matrix(20, 37, torch.float32, device), matrix(1, 37, torch.float32, device)[0]
    assert torch.equal(gather_sum(values, features, token_ends, W, bias), bias.expand(3, 37))
    assert torch.equal(entry_dots(W[:3], W, tokens, features, token_ends), torch.zeros(25, device=device))


def test_rows_without_entries_are_not_read(device):
    """Row 0 among them, which stands in for that of an unused slot."""
    given = entries(11, 45, device)
    values, tokens, features, token_ends = given
    n = int(token_ends[-1])
    left, W = matrix(11, 37, torch.float32, device), matrix(45, 37, torch.float32, device, seed=2)
    moved = torch.cat((features[:n] + 1, features[n:]))
    below = torch.nn.functional.pad(W, (0, 0, 1, 0), value=float("nan"))
    expected = gather_sum(values, features, token_ends, W)
    assert torch.equal(gather_sum(values, moved, token_ends, below), expected)
    later, later_ends = torch.cat((tokens[:n] + 1, tokens[n:])), torch.nn.functional.pad(token_ends, (1, 0))
    left_below = torch.nn.functional.pad(left, (0, 0, 1, 0), value=float("nan"))
    expected = entry_dots(left, W, tokens, features, token_ends)
    assert torch.equal(entry_dots(left_below, below, later, moved, later_ends), expected)


def test_nan_is_not_hidden(device):
    given = entries(11, 45, device)
    values, tokens, features, token_ends = given
    W = matrix(45, 37, torch.float32, device)
    W[7, 36] = float("nan")
    holds = features == 7
    has = torch.zeros(11, dtype=torch.bool, device=device).index_fill_(0, tokens[holds].long(), True)
    assert 0 < has.sum() < 11
    assert torch.equal(gather_sum(values, features, token_ends, W).isnan().any(1), has)
    assert torch.equal(entry_dots(W[:11].nan_to_num(), W, tokens, features, token_ends).isnan(), holds)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", ["rows apart", "transposed", "every second", "unaligned"])
def test_strided_left_and_W(layout, device):
    values, tokens, features, token_ends = entries(11, 45, device)
    left, W = matrix(11, 37, torch.float32, device), matrix(45, 37, torch.float32, device, seed=2)
    views = {
        "rows apart": lambda t: torch.nn.functional.pad(t, (0, 60), value=float("nan"))[:, :37],
        "transposed": lambda t: t.t().contiguous().t(),
        "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "unaligned": lambda t: torch.nn.functional.pad(t, (1, 0))[:, 1:],
    }
    other_left = views[layout](left)
    other_W = views[layout](W) if layout in ("rows apart", "unaligned") else W
    assert torch.equal(other_left, left)
    assert not other_left.is_contiguous()
    expected = entry_dots(left, W, tokens, features, token_ends)
    assert torch.equal(entry_dots(other_left, other_W, tokens, features, token_ends), expected)
    expected = gather_sum(values, features, token_ends, W)
    assert torch.equal(gather_sum(values, features, token_ends, other_W), expected)


def test_same_bits_every_run(device):
    values, tokens, features, token_ends = entries(11, 150, device)
    left, W = matrix(11, 37, torch.bfloat16, device), matrix(150, 37, torch.bfloat16, device, seed=2)
    for run in (
        lambda: gather_sum(values, features, token_ends, W),
        lambda: entry_dots(left, W, tokens, features, token_ends),
    ):
        assert torch.equal(run(), run())


def test_no_gradient(device):
    values, tokens, features, token_ends = entries(11, 45, device)
    left, W = matrix(11, 37, torch.float32, device).requires_grad_(), matrix(45, 37, torch.float32, device)
    W.requires_grad_()
    assert not gather_sum(values.requires_grad_(), features, token_ends, W).requires_grad
    assert not entry_dots(left, W, tokens, features, token_ends).requires_grad


def test_no_entries(device):
    nothing, values = torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device)
    token_ends = torch.zeros(4, dtype=torch.int32, device=device)
    W, bias = matrix(5, 7, torch.float32, device), matrix(1, 7, torch.float32, device)[0]
    assert torch.equal(gather_sum(values, nothing, token_ends, W, bias), bias.expand(3, 7))
    assert entry_dots(W[:3], W, nothing, nothing, token_ends).shape == (0,)


@pytest.mark.parametrize(("B", "F"), [(0, 5), (3, 0)])
def test_no_tokens_or_no_features(B, F, device):
    unused = torch.full((4,), NOWHERE, dtype=torch.int32, device=device)
    token_ends = torch.zeros(B + 1, dtype=torch.int32, device=device)
    left, W, values = (torch.ones(*shape, device=device) for shape in ((B, 7), (F, 7), (4,)))
    assert torch.equal(gather_sum(values, unused, token_ends, W), torch.zeros(B, 7, device=device))
    assert torch.equal(entry_dots(left, W, unused, unused, token_ends), torch.zeros(4, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3, dtype=torch.float64)}, "weights must be"),
        ({"features": torch.zeros(4, dtype=torch.int32)}, "features must be"),
        ({"features": torch.zeros(3, dtype=torch.int64)}, "features must be"),
        ({"token_ends": torch.zeros(6, dtype=torch.int32)[::2]}, "token_ends must be"),
        ({"W": torch.ones(5, 7, dtype=torch.float64)}, "W must be a matrix in fp32, bf16 or fp16"),
        ({"W": torch.ones(7, 5).t()}, "pass W_enc.t"),
        ({"bias": torch.ones(5)}, "bias must be"),
    ],
)
def test_wrong_arguments_of_sum(change, message):
    vector = torch.zeros(3, dtype=torch.int32)
    arguments = {"weights": torch.ones(3), "features": vector, "token_ends": vector, "W": torch.ones(5, 7)}
    with pytest.raises(ValueError, match=message):
        gather_sum(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": torch.ones(2, 6)}, r"left \[B, d\] and W \[F, d\]"),
        ({"left": torch.ones(2, 7, dtype=torch.float64)}, "left must be a matrix in fp32, bf16 or fp16"),
        ({"W": torch.ones(7, 5).t()}, "pass W_enc.t"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens must be"),
        ({"features": torch.zeros(4, dtype=torch.int32)}, "features must be"),
        ({"token_ends": torch.zeros(4, dtype=torch.int32)}, "token_ends must be"),
    ],
)
def test_wrong_arguments_of_dots(change, message):
    vector = torch.zeros(3, dtype=torch.int32)
    arguments = {"left": torch.ones(2, 7), "W": torch.ones(5, 7)}
    arguments |= dict.fromkeys(("tokens", "features", "token_ends"), vector)
    with pytest.raises(ValueError, match=message):
        entry_dots(**(arguments | change))


FAR_ROWS = """
from sampled_sae.kernels.gather_decode import entry_dots, gather_sum
tokens, features = torch.tensor([0, 0, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 1, 2], dtype=torch.int32)
ends, weights = torch.tensor([0, 2, 3, 4], dtype=torch.int32), torch.arange(1.0, 5.0)
assert torch.equal(gather_sum(weights, features, ends, far), gather_sum(weights, features, ends, near))
expected = entry_dots(near, near, tokens, features, ends)
assert torch.equal(entry_dots(far, near, tokens, features, ends), expected)
assert torch.equal(entry_dots(near, far, tokens, features, ends), expected)
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR + FAR_ROWS, tmp_path)
