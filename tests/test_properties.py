"""What holds for any input, on inputs that hypothesis makes."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import problem

from sampled_sae import SparseCodes, reference
from sampled_sae import functional as F
from sampled_sae.config import POOLS, SELECTS, batch_budget, pool_size
from sampled_sae.support.argument_checks import SCORES
from sampled_sae.support.nth_largest import largest_mask, nth_largest
from sampled_sae.testing import whole_numbers

# No clock: neither how long an example takes nor how long one takes to make.
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
levels = st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0])


@st.composite
def cases(draw):
    """Inputs of any odd shape, whole numbers (ties) or normal, with a rule that fits them."""
    B, d, n = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 150))
    make = draw(st.sampled_from([whole_numbers, problem]))
    tensors = make(B, d, n, torch.float64, draw(st.integers(0, 10**6)))
    select = draw(st.sampled_from(SELECTS))
    k = draw(st.integers(1, n)) if select == "token" else draw(st.floats(0.05, n))
    rule = {
        "k": k,
        "l": draw(st.none() | st.floats(1, 8)),
        "score": draw(st.sampled_from(SCORES)),
        "pool": draw(st.sampled_from(POOLS)),
        "select": select,
    }
    return tensors, rule, draw(st.integers(0, 1000))


def codes_of(case):
    t, rule, seed = case
    generator = torch.Generator().manual_seed(seed)
    return F.sampled_topk(t["x"], t["W_enc"], t["b_enc"], generator=generator, **rule)


@quick
@given(cases())
def test_codes_keep_the_budget_are_positive_sorted_and_inside_the_pool(case):
    t, rule, _ = case
    codes = codes_of(case)
    B, n_features = codes.shape
    assert codes.count() <= batch_budget(B, rule["k"]) or rule["select"] == "token"
    if rule["select"] == "token":
        assert torch.bincount(codes.tokens, minlength=B).max() <= rule["k"]
    assert (codes.values > 0).all()
    flat = codes.tokens * n_features + codes.features
    assert (flat[1:] > flat[:-1]).all()
    assert len(codes.active_features()) <= pool_size(rule["k"], rule["l"], n_features)
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    torch.testing.assert_close(codes.values, a[codes.tokens, codes.features])


@quick
@given(cases())
def test_kept_entries_dominate_the_dropped_ones_of_the_same_pool(case):
    t, rule, _ = case
    codes = codes_of(case)
    kept = codes.to_dense()
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    dropped = a[:, codes.active_features()] * (kept[:, codes.active_features()] == 0)
    tolerance = 1e-12
    if rule["select"] == "batch" and codes.count():
        assert dropped.max() <= codes.smallest() + tolerance
        if (dropped > tolerance).any():
            assert codes.count() == batch_budget(len(a), rule["k"])
    if rule["select"] == "token":
        for token in dropped.max(1).values.nonzero().flatten().tolist() if codes.count() else ():
            own = kept[token][kept[token] > 0]
            assert len(own) == rule["k"]
            assert dropped[token].max() <= own.min() + tolerance


@quick
@given(cases())
def test_codes_equal_the_reference(case):
    t, rule, seed = case
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    scores = reference.column_scores(a, rule["score"])
    generator = torch.Generator().manual_seed(seed)
    size = pool_size(rule["k"], rule["l"], a.shape[1])
    ours = codes_of(case).to_dense()
    expected = reference.sampled_topk(t["x"], t["W_enc"], t["b_enc"], generator=generator, **rule)
    ordered = scores.sort(descending=True).values
    tied = size < len(scores) and ordered[size - 1] - ordered[size] < 1e-9
    exact = t["x"].frac().eq(0).all() and rule["score"] != "entropy"
    if exact or not tied:
        torch.testing.assert_close(ours, expected)


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_the_tokens(case, random):
    t, rule, _ = case
    order = list(range(len(t["x"])))
    random.shuffle(order)
    scores = F.column_scores(t["x"], t["W_enc"], t["b_enc"], rule["score"])
    shuffled = F.column_scores(t["x"][order], t["W_enc"], t["b_enc"], rule["score"])
    torch.testing.assert_close(scores, shuffled)
    a = reference.encode(t["x"], t["W_enc"], t["b_enc"])
    assert torch.equal(scores > 0, (a > 0).any(0))
    if rule["score"] == "entropy":
        assert scores.max() <= math.log(len(a)) + 1e-12


@quick
@given(st.lists(levels | st.floats(0, 1e30), min_size=1, max_size=200), st.integers(1, 210))
def test_top_pool_is_the_stable_sort(values, size):
    scores = torch.tensor(values, dtype=torch.float64)
    expected = scores.sort(descending=True, stable=True).indices[:size].sort().values
    assert torch.equal(F.candidate_pool(scores, size), expected)


@quick
@given(st.lists(levels, min_size=1, max_size=100), st.integers(1, 110), st.integers(0, 10**6))
def test_sampled_pool_is_a_draw_without_replacement_that_fires_first(values, size, seed):
    scores = torch.tensor(values)
    members = F.candidate_pool(scores, size, "sample", torch.Generator().manual_seed(seed))
    again = F.candidate_pool(scores, size, "sample", torch.Generator().manual_seed(seed))
    assert torch.equal(members, again)
    assert members.dtype == torch.int64
    assert len(members) == min(size, len(values))
    assert (members[1:] > members[:-1]).all()
    firing = int((scores > 0).sum())
    assert int((scores[members] > 0).sum()) == min(firing, len(members))


@pytest.mark.parametrize("size", [1, 2])
def test_sampled_pool_follows_the_scores(size):
    scores = torch.tensor([1.0, 2.0, 0.0, 5.0])
    p = (scores / scores.sum()).tolist()
    expected = {}
    for first in range(4):
        if size == 1:
            expected[(first,)] = p[first]
            continue
        for second in range(4):
            if first != second:
                pair = tuple(sorted((first, second)))
                expected[pair] = expected.get(pair, 0) + p[first] * p[second] / (1 - p[first])
    generator, draws = torch.Generator().manual_seed(0), 4000
    seen = Counter(tuple(F.candidate_pool(scores, size, "sample", generator).tolist()) for _ in range(draws))
    for members, probability in expected.items():
        spread = 4 * math.sqrt(probability * (1 - probability) / draws)
        assert abs(seen[members] / draws - probability) <= spread


@quick
@given(st.lists(levels | st.floats(-5, 5), min_size=1, max_size=100), st.integers(1, 100))
def test_nth_largest_and_mask(values, n):
    tensor, n = torch.tensor(values, dtype=torch.float64), min(n, len(values))
    order = tensor.sort(descending=True, stable=True)
    assert nth_largest(tensor, n) == order.values[n - 1]
    expected = torch.zeros(len(values), dtype=torch.bool).index_fill(0, order.indices[:n], True)
    assert torch.equal(largest_mask(tensor, n), expected)
    assert torch.equal(nth_largest(tensor.bfloat16(), n), tensor.bfloat16().sort().values[-n])


@quick
@given(st.floats(0.01, 64), st.none() | st.floats(1, 100), st.integers(64, 5000))
def test_pool_size(k, l, n_features):
    size = pool_size(k, l, n_features)
    assert 1 <= size <= n_features
    if l is None:
        assert size == n_features
    else:
        assert size in {min(n_features, math.ceil(k * l) + more) for more in (-1, 0)}
        assert size >= min(n_features, k * l) - 1e-6


@pytest.mark.parametrize(("k", "l", "size"), [(30, 0.1 * 10, 30), (3, 1.1, 4), (32, 4, 128), (0.1, 30, 3)])
def test_pool_size_without_decimal_noise(k, l, size):
    assert pool_size(k, l, 1000) == size


@quick
@given(st.lists(st.lists(levels, min_size=7, max_size=7), min_size=1, max_size=6))
def test_sparse_codes_are_the_dense_matrix(rows):
    dense = torch.tensor(rows)
    codes = SparseCodes.from_dense(dense)
    pool = torch.tensor([1, 2, 4, 6])
    block = SparseCodes.from_block(dense[:, pool], pool, 7)
    inside = torch.zeros_like(dense).index_copy_(1, pool, dense[:, pool])
    factor = torch.arange(1.0, 8.0)
    for made, matrix in ((codes, dense), (block, inside)):
        assert torch.equal(made.to_dense(), matrix)
        assert torch.equal(made.to_sparse_csr().to_dense(), matrix)
        assert made.count() == matrix.count_nonzero()
        assert made.l0() == made.count() / len(rows)
        assert torch.equal(made.active_features(), matrix.any(0).nonzero().squeeze(1))
        positive = matrix[matrix > 0]
        assert made.smallest() == (float(positive.min()) if len(positive) else torch.inf)
        assert torch.equal(made.detach().to_dense(), matrix)
        assert torch.equal(made.scaled(factor).to_dense(), matrix * factor)
        assert f"kept={made.count()}" in repr(made)
