"""The streamed selections: exact whatever the threshold they start from."""

import pytest
import torch
from kernel_makers import EPS, integers

pytest.importorskip("triton")

from sampled_sae import reference
from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.triton import layer, products, stream

pytestmark = pytest.mark.usefixtures("poisoned", "small_chunks")

INF = float("inf")
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HINTS = [None, "last", 0.0, -1.0, 1e-40, 1.0, 1e30, INF, NAN]


def zeros(W):
    return torch.zeros(len(W), device=W.device)


def activations(x, W, b, scale, members=None):
    a = reference.encode(x, W.t(), b, scale).float()
    return a if members is None else torch.zeros_like(a).index_copy_(1, members, a[:, members])


def entries(a, mask, slots):
    """values, tokens, features of the mask, filled up as unused slots are."""
    tokens, features = mask.nonzero(as_tuple=True)
    fill = (0.0, *a.shape)
    found = (a[tokens, features], tokens.int(), features.int())
    return [torch.cat([t, torch.full((slots - len(t),), f, device=a.device).to(t)]) for t, f in zip(found, fill)]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def assert_batch(found, a, n):
    values, tokens, features, hint = found
    expected = entries(a, reference.select_batch(a, n), n)
    assert_same((values, tokens, features), expected)
    smallest = expected[0].min() if n else 0.0
    assert hint.shape == (1,)
    assert 0.8 * smallest <= hint <= 0.99 * smallest


def as_hint(hint, a, n):
    if hint is None:
        return None
    if hint == "last":
        hint = float(a.flatten().sort(descending=True).values[max(n, 1) - 1])
    return torch.tensor([hint], device=a.device)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("n", [0, 1, 60, 500])
@pytest.mark.parametrize(("i", "hint"), enumerate(HINTS))
def test_batch_is_exact_whatever_the_hint(i, hint, n, device):
    """By turns among all features and in a pool."""
    x, W, b, scale = integers((20, 5, 140), torch.float32, device)
    members = torch.arange(3, 140, 3, device=device) if (i + (n > 0) + (n > 60)) % 2 else None
    a = activations(x, W, b, scale, members)
    assert_batch(stream.stream_batch(Operands(x, W, b, scale, members), n, as_hint(hint, a, n)), a, n)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("n", [1000, 2799, 2800, 3000])
def test_budgets_that_are_not_filled(n, device):
    """Fewer positives than the budget, and a budget beyond all entries."""
    x, W, b, scale = integers((20, 5, 140), torch.float32, device)
    a = activations(x, W, b - 4, scale)
    assert 0 < int((a > 0).sum()) < 1000
    for hint in (None, torch.zeros(1, device=device), torch.full((1,), 2.0, device=device)):
        assert_batch(stream.stream_batch(Operands(x, W, b - 4, scale, None), n, hint), a, n)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("fused", [True, False], ids=["in tiles", "in chunks"])
def test_dtypes_with_and_without_a_scale(fused, has_scale, dtype, device, monkeypatch):
    monkeypatch.setattr(stream, "largest_fused_d", lambda *_: 5 if fused else 4)
    x, W, b, scale = integers((20, 5, 140), dtype, device)
    b, scale = (b, scale) if has_scale else (zeros(W), None)
    a = activations(x, W, b, scale)
    assert_batch(stream.stream_batch(Operands(x, W, b, scale, None), 300), a, 300)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("members", [None, range(3, 140, 3)], ids=["all", "pool"])
def test_a_wrong_hint_changes_no_bit_of_16_bit_products(members, dtype, device, repairs):
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 70, generator=make).to(device, dtype) for n in (40, 140))
    members = None if members is None else torch.tensor(members, device=device)
    operands = Operands(x, W, torch.randn(140, generator=make).to(device), None, members)
    *expected, hint = stream.stream_batch(operands, 300, stream.stream_batch(operands, 300)[-1])
    repairs.pop(0)
    for wrong in (0.01 * hint, 10 * hint):
        assert_same(stream.stream_batch(operands, 300, wrong)[:3], expected)
    assert repairs == [False, True, True]


def all_tokens_equal(x, W, b):
    x[:] = x[0]


def all_entries_tied(x, W, b):
    x[:], W[:], b[:] = 1, 1, 0


def none_positive(x, W, b):
    b[:] = -1000


def all_in_one_chunk(x, W, b):
    b[:] = -1000
    b[70:90] = 50


def all_in_one_token(x, W, b):
    x[:7], x[8:], b[:] = 0, 0, 0
    x[7], W[:] = 1, 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "change", [all_tokens_equal, all_entries_tied, none_positive, all_in_one_chunk, all_in_one_token]
)
@pytest.mark.parametrize("n", [50, 350])
def test_hard_batches(n, change, device):
    x, W, b, _ = integers((20, 5, 140), torch.float32, device)
    change(x, W, b)
    a = activations(x, W, b, None)
    hint = None
    for _ in range(2):
        *found, hint = stream.stream_batch(Operands(x, W, b, None, None), n, hint)
        assert_batch((*found, hint), a, n)


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 3, 0)])
def test_empty(shape, device):
    x, W, b, scale = integers(shape, torch.float32, device)
    a = torch.zeros(shape[0], shape[2], device=device)
    assert_batch(stream.stream_batch(Operands(x, W, b, scale, None), 4), a, 4)
    assert_same(stream.stream_token(Operands(x, W, b, scale, None), 2), entries(a, a > 0, 2 * shape[0]))
    assert all(len(t) == 0 for t in stream.stream_above(Operands(x, W, b, scale, None), 0.0))


def normal_batch(seed, device, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(256, 8, generator=make).to(device, dtype)


@pytest.mark.slow
def test_hints_of_like_batches_need_no_repair(repairs, device):
    """The first threshold from a sample, the next ones from the batch before."""
    W = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)).to(device)
    hint = None
    for seed in range(4):
        values, _, _, hint = stream.stream_batch(Operands(normal_batch(seed, device), W, zeros(W)), 2000, hint)
        assert values.min() > 0
    assert repairs == [False] * 4


def test_hint_recovers_after_a_repair(repairs, device):
    W = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)).to(device)
    hint = torch.full((1,), 1e9, device=device)
    for seed in range(3):
        *_, hint = stream.stream_batch(Operands(normal_batch(seed, device), W, zeros(W)), 2000, hint)
    assert repairs == [True, False, False]


def test_the_hint_is_not_changed(device):
    x, W, b, scale = integers((20, 5, 140), torch.float32, device)
    hint = torch.full((1,), 3.0, device=device)
    stream.stream_batch(Operands(x, W, b, scale, None), 50, hint)
    assert hint.tolist() == [3.0]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("members", [None, range(3, 140, 3)], ids=["all", "pool"])
@pytest.mark.parametrize("k", [1, 3, 20, 46, 140, 143])
def test_token_stream(k, members, device):
    x, W, b, scale = integers((20, 5, 140), torch.float32, device)
    x[5] *= 50
    x[6] = 0
    members = None if members is None else torch.tensor(members, device=device)
    a = activations(x, W, b, scale, members)
    expected = entries(a, reference.select_token(a, k), 20 * k)
    assert_same(stream.stream_token(Operands(x, W, b, scale, members), k), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_stream_dtypes(dtype, device):
    x, W, _, _ = integers((20, 5, 140), dtype, device)
    a = activations(x, W, zeros(W), None)
    expected = entries(a, reference.select_token(a, 4), 80)
    assert_same(stream.stream_token(Operands(x, W, zeros(W)), 4), expected)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("members", [None, range(3, 140, 3)], ids=["all", "pool"])
@pytest.mark.parametrize("tau", [-1.0, 0.0, 1.0, 1.5, 7.0, 1000.0, INF])
@pytest.mark.parametrize("guess", [1, 200])
def test_above_is_strict(guess, tau, members, device, monkeypatch):
    monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", guess)
    x, W, b, scale = integers((20, 5, 140), torch.float32, device)
    members = None if members is None else torch.tensor(members, device=device)
    a = activations(x, W, b, scale, members)
    mask = (a > 0) & (a > tau)
    values, tokens, features = stream.stream_above(Operands(x, W, b, scale, members), tau)
    expected = entries(a, mask, int(mask.sum()))
    assert_same((values, tokens.int(), features.int()), expected)
    assert tokens.dtype == features.dtype == torch.int64
    again = stream.stream_above(Operands(x, W, b, scale, members), torch.tensor(tau, device=device))
    assert_same(again, (values, tokens, features))


def test_keys_beyond_32_bits_are_sorted(device):
    keys = torch.tensor([2**40, 5, 2**31, 2**32 + 1], device=device)
    values, ordered = stream.in_order(torch.arange(4.0, device=device), keys, (2**20, 2**20))
    assert ordered.tolist() == [5, 2**31, 2**32 + 1, 2**40]
    assert values.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("shape", [(8192, 65536), (100, 100), (10**6, 10**5), (1, 10)])
def test_chunks_are_of_bounded_width(shape, monkeypatch):
    monkeypatch.setattr(products, "NARROWEST", 1024)
    monkeypatch.setattr(products, "WIDEST", 8192)
    width = products.chunk_width(shape[0])
    assert width == {8192: 4096, 10**6: 1024}.get(shape[0], 8192)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_fp32_whatever_the_inputs(dtype, device):
    make = torch.Generator().manual_seed(0)
    a = torch.randn(33, 129, generator=make).to(device, dtype)
    b = torch.randn(65, 129, generator=make).to(device, dtype).t()
    out = torch.empty(33, 65, device=device)
    expected = a.double() @ b.double()
    band = 1e-6 * (a.double().abs() @ b.double().abs())
    for found in (products.product(a, b), products.product(a, b, out=out)):
        assert found.dtype == torch.float32
        assert ((found.double() - expected).abs() <= band).all()
    assert found is out or found.data_ptr() == out.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has nothing to wait for")
def test_nothing_waits_for_the_gpu(device):
    x, W, b, scale = integers((20, 5, 140), torch.bfloat16, device)
    stream.stream_batch(Operands(x, W, b, scale, None), 60)
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, hint = stream.stream_batch(Operands(x, W, b, scale, None), 60)
        stream.stream_batch(Operands(x, W, b, scale, None), 60, hint)
        stream.stream_token(Operands(x, W, b, scale, None), 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("per_feature", [False, True])
def test_list_and_dense_form_of_16_bits_differ_by_rounding_alone(per_feature, dtype, device):
    """Their products are summed in another order. The threshold is an activation, so that it may be in one alone."""
    make = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 200, generator=make).to(device, dtype) for n in (64, 130))
    b = torch.randn(130, generator=make).to(device)
    encoder = layer.encoder(x, W, b)
    a = stream.dense_products(encoder.operands)
    threshold = a[5].abs() if per_feature else a[a > 20][0]
    listed = layer.above_threshold(encoder, threshold).to_dense()
    dense = layer.dense_above_threshold(encoder, threshold)
    exact = x.double() @ W.double().t() + b.double()
    band = 4 * EPS * (x.double().abs() @ W.double().abs().t() + b.abs())
    alone = (listed > 0) != (dense > 0)
    assert ((listed - dense).abs() <= band)[~alone].all()
    assert ((exact - threshold).abs() <= band)[alone].all()
    assert 50 < int((dense > 0).sum()) < dense.numel() / 2
    if device == "cpu":
        assert not torch.equal(listed, dense), "the docstrings could promise equality"


def test_list_and_dense_form_of_whole_numbers_are_equal(device):
    x, W, b, scale = integers((45, 19, 133), torch.bfloat16, device)
    encoder = layer.encoder(x, W, b, scale=scale)
    threshold = torch.tensor(3.0, device=device)
    dense = layer.dense_above_threshold(encoder, threshold)
    assert torch.equal(layer.above_threshold(encoder, threshold).to_dense(), dense)
    assert int((dense > 0).sum()) > 0
