from itertools import pairwise

import pytest
import torch
from kernel_makers import FAR, NEEDS_VIRTUAL_MEMORY, assert_runs_alone, assert_within_rounding, matrix

pytest.importorskip("triton")

from sampled_sae.kernels.segment_sum import feature_order, segment_sum

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# entries of each segment; the interpreter sums 4 at once, divides the list after every 16, and adds 4 pieces at once;
# a GPU divides it after every 256, and there segments and d are 16 times as long
LENGTHS = [
    pytest.param([1], id="one entry"),
    pytest.param([3, 0, 1, 0, 0, 9, 2, 0], id="one piece"),
    pytest.param([6, 15], id="two pieces"),
    pytest.param([0, 16, 16, 0, 0, 32, 16, 0], id="pieces end between segments"),
    pytest.param([5, 0, 30, 13, 16, 0, 17, 1, 0, 14], id="pieces end inside segments"),
    pytest.param([7, 121, 0, 2], id="a long segment"),
    pytest.param([0, 150, 0], id="all in one segment"),
    pytest.param([0, 0, 0], id="empty segments"),
]
UNUSED = [0, 1, 40]
NOWHERE = 2**31 - 1
B = 29


def segments(lengths, device, unused=5, seed=0):
    """(weights, tokens, order, ends): the unused slots come last in the order, with NaN and an index nowhere."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths) * (16 if device == "cuda" else 1)
    n = int(lengths.sum())
    place = torch.randperm(n, generator=make)
    weights = torch.cat((torch.randn(n, generator=make), torch.full((unused,), float("nan"))))
    tokens = torch.cat((torch.randint(0, B, (n,), generator=make), torch.full((unused,), NOWHERE))).int()
    order = torch.cat((place, torch.arange(n, n + unused))).int()
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return tuple(t.to(device) for t in (weights, tokens, order, ends))


def check(given, source, rows=None, n_rows_out=None, with_sums=True):
    """Against float64, and zero where no segment is written."""
    weights, tokens, order, ends = given
    n_rows_out = len(ends) - 1 if n_rows_out is None else n_rows_out
    norm = torch.full((), float("nan"), device=source.device)
    found, sums = segment_sum(*given, source, rows, n_rows_out, with_sums, norm)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(found))
    terms = torch.zeros(2, n_rows_out, source.shape[1] + 1, dtype=torch.float64, device=source.device)
    with_ones = torch.nn.functional.pad(source.double(), (0, 1), value=1.0)
    for r, (start, end) in enumerate(pairwise(ends.tolist())):
        at = order[start:end].long()
        w, x = weights[at].double(), with_ones[tokens[at].long()]
        terms[:, r if rows is None else rows[r]] = torch.stack((w @ x, w.abs() @ x.abs()))
    expected, magnitude = terms
    assert_within_rounding(found, expected[:, :-1], magnitude[:, :-1])
    if with_sums:
        assert_within_rounding(sums, expected[:, -1], magnitude[:, -1])
    else:
        assert sums is None


@pytest.mark.one_in(5)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, lengths, device):
    check(segments(lengths, device), matrix(B, 37, dtype, device))


@pytest.mark.parametrize("d", [1, 16, 33])
@pytest.mark.parametrize("with_sums", [True, False])
def test_tiles_of_d(with_sums, d, device):
    d *= 16 if device == "cuda" else 1
    check(segments([5, 0, 30, 13], device), matrix(B, d, torch.float32, device), with_sums=with_sums)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("with_sums", [True, False])
def test_rows_of_a_dense_result(with_sums, lengths, device):
    rows = torch.arange(len(lengths), device=device) * 3 + 1
    check(segments(lengths, device), matrix(B, 37, torch.float32, device), rows, 3 * len(lengths) + 2, with_sums)


@pytest.mark.parametrize("unused", UNUSED)
@pytest.mark.parametrize("lengths", [[5, 0, 30], [16, 16], [0]], ids=str)
def test_unused_slots(lengths, unused, device):
    check(segments(lengths, device, unused), matrix(B, 17, torch.float32, device))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("unused", UNUSED)
def test_by_feature(unused, device):
    """All the way from kept entries: with every feature once, the gradient c^T g of a dense product."""
    F = 23
    make = torch.Generator().manual_seed(3)
    codes = torch.randn(B, F, generator=make) * (torch.rand(B, F, generator=make) < 0.3)
    codes[:, [0, 7, F - 1]] = 0
    codes[:, 5] = torch.rand(B, generator=make) + 1
    tokens, features = codes.nonzero(as_tuple=True)
    values = torch.cat((codes[tokens, features], torch.zeros(unused))).to(device)
    tokens = torch.cat((tokens, torch.full((unused,), B))).int().to(device)
    features = torch.cat((features, torch.full((unused,), F))).int().to(device)
    g, codes = matrix(B, 37, torch.float32, device), codes.double().to(device)
    expected, magnitude = codes.t() @ g.double(), codes.abs().t() @ g.double().abs()
    for rows in (torch.arange(F, device=device), (codes != 0).any(0).nonzero().squeeze(1)):
        order, ends = feature_order(features, rows)
        place = None if len(rows) == F else rows
        found, sums = segment_sum(values, tokens, order, ends, g, place, F, with_sums=True)
        assert_within_rounding(found, expected, magnitude)
        assert_within_rounding(sums, codes.sum(0), codes.abs().sum(0))
        compact, _ = segment_sum(values, tokens, order, ends, g, None, len(rows))
        assert torch.equal(compact, found[rows])


def test_more_entries_than_rows_of_source(device):
    check(segments([0, 90, 3], device), matrix(B, 5, torch.float32, device)[:2].repeat(15, 1))


def test_rows_without_entries_are_not_read(device):
    """Row 0 among them, which stands in for that of an entry past the end."""
    weights, tokens, order, ends = segments([5, 0, 30, 13], device)
    used = (tokens != NOWHERE).int()
    source = matrix(B, 37, torch.float32, device)
    below = torch.nn.functional.pad(source, (0, 0, 1, 0), value=float("nan"))
    expected, sums = segment_sum(weights, tokens, order, ends, source, None, 4, with_sums=True)
    found, found_sums = segment_sum(weights, tokens + used, order, ends, below, None, 4, with_sums=True)
    assert torch.equal(found, expected)
    assert torch.equal(found_sums, sums)


def test_nan_is_not_hidden(device):
    given = segments([5, 0, 30, 13], device)
    source = matrix(B, 37, torch.float32, device)
    _, tokens, order, ends = given
    source[tokens[order[ends[4] - 1]]] = float("nan")
    found, _ = segment_sum(*given, source, None, 4)
    assert found[3].isnan().all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "every second", "unaligned", "one column"])
def test_strided_source(layout, device):
    given = segments([5, 0, 30, 13], device)
    source = matrix(B, 37, torch.float32, device)
    views = {
        "rows apart": lambda t: torch.nn.functional.pad(t, (0, 60), value=float("nan"))[:, :37],
        "transposed": lambda t: t.t().contiguous().t(),
        "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "unaligned": lambda t: torch.nn.functional.pad(t, (1, 0))[:, 1:],
        "one column": lambda t: t[:, :1],
    }
    other = views[layout](source)
    assert not other.is_contiguous()
    expected, _ = segment_sum(*given, source, None, 4)
    found, _ = segment_sum(*given, other, None, 4)
    assert torch.equal(found, expected[:, : other.shape[1]])


def test_same_bits_every_run(device):
    given, source = segments([7, 121, 0, 2], device), matrix(B, 37, torch.bfloat16, device)
    first, first_sums = segment_sum(*given, source, None, 4, with_sums=True)
    again, again_sums = segment_sum(*given, source, None, 4, with_sums=True)
    assert torch.equal(again, first)
    assert torch.equal(again_sums, first_sums)


def test_no_gradient(device):
    weights, *places = segments([5, 0, 30, 13], device)
    source = matrix(B, 37, torch.float32, device).requires_grad_()
    found, sums = segment_sum(weights.requires_grad_(), *places, source, None, 4, with_sums=True)
    assert not found.requires_grad
    assert not sums.requires_grad


@pytest.mark.parametrize("rows", [None, [], [1, 4]])
def test_no_entries(rows, device):
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device)
    R = 6 if rows is None else len(rows)
    ends = torch.zeros(R + 1, dtype=torch.int32, device=device)
    source = matrix(B, 7, torch.float32, device)
    found, sums = segment_sum(nothing.float(), nothing, nothing, ends, source, rows, 6, with_sums=True)
    assert torch.equal(found, torch.zeros(6, 7, device=device))
    assert torch.equal(sums, torch.zeros(6, device=device))


def test_feature_order(device):
    """Entries by feature, then token, those of unused slots last; a row without entries ends where it begins."""
    features = torch.tensor([2, 5, 0, 5, 9, 2, 5, 12, 12], dtype=torch.int32, device=device)
    order, ends = feature_order(features, torch.tensor([0, 1, 2, 5, 7, 9, 11], device=device))
    assert order.dtype == ends.dtype == torch.int32
    assert order.tolist() == [2, 0, 5, 1, 3, 6, 4, 7, 8]
    assert ends.tolist() == [0, 1, 1, 3, 6, 6, 7, 7]


def test_feature_order_is_stable(device):
    features = torch.randint(0, 7, (5000,), generator=torch.Generator().manual_seed(0)).int().to(device)
    order, ends = feature_order(features, torch.arange(7, device=device))
    for r, (start, end) in enumerate(pairwise(ends.tolist())):
        assert torch.equal(order[start:end].long(), (features == r).nonzero().squeeze(1))


@pytest.mark.parametrize("features", [[], [3, 3]])
@pytest.mark.parametrize("rows", [[], [0, 2]])
def test_feature_order_of_nothing(rows, features, device):
    features = torch.tensor(features, dtype=torch.int32, device=device)
    order, ends = feature_order(features, torch.tensor(rows, dtype=torch.int64, device=device))
    assert order.tolist() == list(range(len(features)))
    assert ends.tolist() == [0] * (len(rows) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3, dtype=torch.float16)}, "weights must be"),
        ({"tokens": torch.zeros(4, dtype=torch.int32)}, "tokens must be"),
        ({"order": torch.zeros(3, dtype=torch.int64)}, "order must be"),
        ({"ends": torch.zeros(3)}, "ends must be"),
        ({"source": torch.ones(5)}, "source must be a matrix in fp32, bf16 or fp16"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "rows must be"),
        ({"n_rows_out": 3}, "n_rows_out must be 2"),
    ],
)
def test_wrong_arguments(change, message):
    vector = torch.zeros(3, dtype=torch.int32)
    arguments = {"weights": torch.ones(3), "source": torch.ones(5, 7), "rows": None, "n_rows_out": 2}
    arguments |= dict.fromkeys(("tokens", "order", "ends"), vector)
    with pytest.raises(ValueError, match=message):
        segment_sum(**(arguments | change))


@pytest.mark.parametrize(("features", "rows"), [(torch.int64, torch.int64), (torch.int32, torch.int32)])
def test_wrong_arguments_of_feature_order(features, rows):
    with pytest.raises(ValueError, match="must be contiguous"):
        feature_order(torch.zeros(3, dtype=features), torch.zeros(2, dtype=rows))


FAR_ROWS = """
from sampled_sae.kernels.segment_sum import segment_sum
tokens, order = (torch.tensor(at, dtype=torch.int32).repeat(10) for at in ([2, 0, 1, 2], [0] * 4))
order += torch.arange(40, dtype=torch.int32)
ends, weights = torch.tensor([0, 2, 40], dtype=torch.int32), torch.arange(40.0)
found, _ = segment_sum(weights, tokens, order, ends, far, None, 2)
assert torch.equal(found, segment_sum(weights, tokens, order, ends, near, None, 2)[0])
"""


@NEEDS_VIRTUAL_MEMORY
def test_offsets_beyond_32_bits(tmp_path):
    assert_runs_alone(FAR + FAR_ROWS, tmp_path)
