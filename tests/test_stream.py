"""The streamed selections: exact whatever the guess, and never a full [B, F] tensor."""

import pytest
import torch
from makers import make_sae, problem, run, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from sampled_sae import SparseCodes, reference
from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.torch import products, scores, search, stream
from sampled_sae.testing import whole_numbers


@pytest.fixture(params=[2048, 7])
def block_tokens(request, monkeypatch):
    """Tokens that are taken at a time: all of a small batch, or a few."""
    monkeypatch.setattr(products, "BLOCK_TOKENS", request.param)


def dense_entries(dense):
    codes = SparseCodes.from_dense(dense)
    return codes.values, codes.tokens, codes.features


@pytest.mark.one_in(7)
@pytest.mark.usefixtures("poisoned_memory", "block_tokens")
@pytest.mark.parametrize("members", [None, torch.arange(3, 1000, 7)], ids=["all", "pool"])
@pytest.mark.parametrize("n", [0, 1, 100, 4000, 10**6])
@pytest.mark.parametrize("hint", ["exact", 0.0, -1.0, 1e-30, 1.0, 3.0, 1e30, float("inf"), float("nan"), None])
def test_batch_stream_is_exact_whatever_the_hint(hint, n, members):
    t = whole_numbers(40, 5, 1000)
    x, W, b = t["x"], t["W_enc"].t(), t["b_enc"]
    a = reference.encode(x, t["W_enc"], b)
    if members is not None:
        a = torch.zeros_like(a).index_copy_(1, members, a[:, members])
    expected = dense_entries(torch.where(reference.select_batch(a, n), a, 0))
    if hint == "exact":
        hint = float(expected[0].min()) if len(expected[0]) else 0.0
    for ours, theirs in zip(stream.stream_batch(Operands(x, W, b, None, members), n, hint), expected):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("poisoned_memory", "block_tokens")
@pytest.mark.parametrize("members", [None, torch.arange(3, 1000, 7)], ids=["all", "pool"])
@pytest.mark.parametrize("k", [1, 3, 20, 40, 143])
def test_token_stream(k, members):
    t = whole_numbers(40, 5, 1000)
    x, b = t["x"], t["b_enc"]
    x[5] *= 50  # a token that fires far above the others
    x[6] = 0
    a = reference.encode(x, t["W_enc"], b)
    if members is not None:
        a = torch.zeros_like(a).index_copy_(1, members, a[:, members])
    expected = dense_entries(torch.where(reference.select_token(a, k), a, 0))
    for ours, theirs in zip(stream.stream_token(Operands(x, t["W_enc"].t(), b, None, members), k), expected):
        assert torch.equal(ours, theirs)


def test_entries_of_chunks_are_merged_as_sorting_would():
    """One of the chunks is empty, and so are some tokens of each."""
    g = torch.Generator().manual_seed(0)
    a = torch.where(torch.rand(30, 400, generator=g) < 0.1, torch.rand(30, 400, generator=g), 0)
    a[:, 100:150] = 0
    parts = []
    for start, stop in ((0, 100), (100, 150), (150, 390), (390, 400)):
        values, tokens, columns = dense_entries(a[:, start:stop])
        parts.append(search.Entries(values, tokens, columns + start))
    for some in (parts, parts[:1]):
        expected = dense_entries(a if some is parts else a[:, :100])
        assert all(torch.equal(*pair) for pair in zip(search.merged(some, 30), expected))


@pytest.mark.usefixtures("poisoned_memory", "block_tokens")
@pytest.mark.parametrize("score", ["l2", "l2_squared", "entropy", "uniform"])
def test_scores(score):
    t = problem(40, 5, 300)
    scale = torch.linspace(0.5, 2, 300, dtype=torch.float64)
    found = scores.column_statistics(Operands(t["x"], t["W_enc"].t(), t["b_enc"], scale), score)
    expected = reference.column_scores(reference.encode(t["x"], t["W_enc"], t["b_enc"]) * scale, score)
    torch.testing.assert_close(scores.finish_scores(found, score), expected)


@pytest.mark.usefixtures("block_tokens")
def test_threshold_counts():
    t = problem(40, 5, 300)
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    thresholds = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    found = scores.threshold_counts(Operands(t["x"], t["W_enc"].t(), t["b_enc"]), thresholds)
    assert found.tolist() == [int((a > threshold).sum()) for threshold in thresholds]


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result holds (for sparse ones: stored elements)."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                stored = t._nnz() if t.layout == torch.sparse_csr else t.untyped_storage().nbytes() // t.itemsize
                self.largest = max(self.largest, stored)
        return result


def spread(t):
    """All tokens alike."""


def one_loud_token(t):
    """One token fires everywhere, the others in few places: no block may be sized by the loudest token."""
    t["b_enc"] -= 4
    t["x"][:, 0] = t["b_dec"][0]
    t["x"][3, 0] += 1000.0
    t["W_enc"][0] = t["W_enc"][0].abs() + 0.1


@pytest.mark.parametrize("tokens", [spread, one_loud_token])
@pytest.mark.parametrize(
    "rule",
    [
        {"l": 4.0},
        {"l": 4.0, "score": "entropy"},
        {"l": 4.0, "pool": "sample"},
        {"l": 4.0, "select": "token"},
        {"l": 200.0},
        {"l": None},
        {"l": None, "select": "token"},
    ],
    ids=str,
)
def test_no_full_matrix_is_ever_allocated(rule, tokens, monkeypatch):
    B, d, n_features = 256, 8, 8192
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", B * n_features // 8)
    tensors = problem(B, d, n_features, torch.float32)
    tokens(tensors)
    with LargestTensor() as seen:
        run(tensors, "torch", generator_seed=0, k=8, **rule)
    assert B * d < seen.largest <= B * n_features // 3
    with LargestTensor() as seen:
        run(tensors, "reference", generator_seed=0, k=8, **rule)
    assert seen.largest >= B * n_features


@pytest.mark.parametrize("select", ["batch", "token"])
def test_a_batch_that_cannot_fill_its_budget_is_not_computed_twice(select, monkeypatch):
    sae = make_sae(l=None, select=select)
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
    passes = []
    spans = stream.candidate_spans
    monkeypatch.setattr(stream, "candidate_spans", lambda *a: passes.append(1) or spans(*a))
    for seed in range(4):
        kept = sae(tokens(40, 12, seed=seed)).codes.count()
        assert 0 < kept < 40 * sae.cfg.k
    assert len(passes) == 4
