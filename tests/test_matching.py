"""Pairs of features, against brute force and by hand."""

import itertools

import pytest
import torch

from sampled_sae.comparison import match_features, matching

scipy = pytest.importorskip("scipy")


def rows(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2)


@pytest.mark.parametrize(("n_a", "n_b"), [(6, 6), (4, 6), (6, 4), (1, 3)])
def test_hungarian_is_the_best_of_all_matchings(n_a, n_b):
    a, b = rows(n_a), rows(n_b, seed=1)
    found, cosine = match_features(a, b, "hungarian"), cosines(a, b)
    small, matrix = min(n_a, n_b), cosine.t() if n_a > n_b else cosine
    matchings = itertools.permutations(range(max(n_a, n_b)), small)
    best = max(sum(matrix[i, j] for i, j in enumerate(chosen)) for chosen in matchings)
    assert float(found.cosine.sum()) == pytest.approx(float(best), rel=1e-5)
    assert torch.allclose(found.cosine.double(), cosine[found.a, found.b], atol=1e-6)
    assert len(set(found.a.tolist())) == len(set(found.b.tolist())) == small
    assert torch.allclose(found.nearest_a.double(), cosine.amax(1), atol=1e-6)
    assert torch.allclose(found.nearest_b.double(), cosine.amax(0), atol=1e-6)


def brute_greedy(cosine, allowed):
    taken_a, taken_b, pairs = set(), set(), []
    order = sorted(itertools.product(*map(range, cosine.shape)), key=lambda pair: (-float(cosine[pair]), pair))
    for i, j in order:
        if allowed[i, j] and i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            pairs.append((i, j))
    return sorted(pairs)


@pytest.mark.parametrize("candidates", [1, 3, 40])
@pytest.mark.parametrize("block_bytes", [1, 400, 1 << 27])
def test_greedy_by_hand(candidates, block_bytes, monkeypatch):
    monkeypatch.setattr(matching, "CANDIDATES", candidates)
    monkeypatch.setattr(matching, "_BLOCK_BYTES", block_bytes)
    a, b = rows(23), rows(31, seed=1)
    cosine = cosines(a, b)
    allowed = torch.zeros_like(cosine, dtype=torch.bool)
    allowed.scatter_(1, cosine.topk(min(candidates, 31), dim=1).indices, True)
    allowed.scatter_(0, cosine.topk(min(candidates, 23), dim=0).indices, True)
    found = match_features(a, b, "greedy")
    assert list(zip(found.a.tolist(), found.b.tolist())) == brute_greedy(cosine, allowed)
    assert torch.allclose(found.cosine.double(), cosine[found.a, found.b], atol=1e-6)
    assert torch.allclose(found.nearest_b.double(), cosine.amax(0), atol=1e-6)
    back = match_features(b, a, "greedy")
    assert sorted(zip(back.b.tolist(), back.a.tolist())) == list(zip(found.a.tolist(), found.b.tolist()))


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_the_same_features_in_another_order_and_length(method):
    a = rows(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    found = match_features(a, 7 * a[order].to(torch.bfloat16), method)
    assert torch.equal(order[found.b], found.a)
    assert (found.cosine > 0.999).all()


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_rows_of_any_length(method):
    a, lengths = rows(20), torch.logspace(-200, 200, 20, dtype=torch.float64)[:, None]
    found = match_features(a.double() * lengths, a, method)
    assert torch.equal(found.a, found.b)
    assert (found.cosine > 0.999).all()
    a[3] = 0
    assert match_features(a, a, method).cosine[3] == 0


def test_what_was_done_is_said(monkeypatch):
    a, b = rows(5), rows(5, seed=1)
    assert match_features(a, b).how == "Hungarian method (scipy.optimize.linear_sum_assignment)"
    assert match_features(a, b, "greedy").how == "greedy among the 32 nearest of each feature"
    monkeypatch.setattr(matching, "MOST_PAIRS", 24)
    assert match_features(a, b).how.endswith(", for 5 by 5 features are many for the Hungarian method")
    monkeypatch.setattr(matching, "MOST_PAIRS", 25)
    monkeypatch.setattr(matching.importlib.util, "find_spec", lambda name: None)
    assert match_features(a, b).how.endswith(', for scipy is not installed: pip install "sampled-sae[compare]"')
    with pytest.raises(ImportError, match=r'needs scipy: pip install "sampled-sae\[compare\]"'):
        match_features(a, b, "hungarian")


def test_bad_rows():
    for a, b, method, said in (
        (rows(3), rows(3), "best", r"method='best': must be one of 'auto', 'hungarian', 'greedy'"),
        (rows(3), rows(3, 5), "auto", r"rows_b=tensor \(3, 5\): must be as wide as rows_a, 6"),
        (rows(3), torch.zeros(0, 6), "auto", r"rows_b=tensor \(0, 6\): must be a floating tensor \[F, d\]"),
        (rows(3), torch.full((3, 6), torch.nan), "hungarian", r"rows_b: 18 of 18 values are NaN or inf"),
        (torch.full((3, 6), -torch.inf), rows(3), "greedy", r"rows_a: 18 of 18 values are NaN or inf"),
        (torch.ones(3, 6, dtype=torch.int64), rows(3), "auto", r"rows_a=tensor \(3, 6\): must be a floating"),
    ):
        with pytest.raises(ValueError, match=said):
            match_features(a, b, method)
