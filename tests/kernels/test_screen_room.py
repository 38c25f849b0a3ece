"""What a screen of the Triton form leaves open has room in its lists; where nothing is gained it does not look."""

import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton
from screened_encoders import DEVICE, TRITON, both, drawn, on_cpu, triton_encoder

from sampled_sae.codes import SparseCodes
from sampled_sae.impl.hints import Rule, ThresholdHints
from sampled_sae.impl.triton import products, screen_entries, stream
from sampled_sae.kernels import configs

pytestmark = [pytest.mark.usefixtures("small_chunks"), pytest.mark.gpu]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks on a GPU too, and lists whose room comes from the budget alone."""
    monkeypatch.setattr(products, "NARROWEST", 64)
    monkeypatch.setattr(products, "WIDEST", 64)
    monkeypatch.setattr(stream, "SLACK", 0)


@pytest.fixture
def long_rows(monkeypatch):
    """In the interpreter a row takes a few steps, not hundreds."""
    monkeypatch.setitem(configs.ROUNDED_ROWS, "interpreter", triton.Config({"BR": 64, "BD": 2048}))
    monkeypatch.setitem(configs.ENTRY_DOTS, ("interpreter", 32), triton.Config({"BE": 64, "BD": 2048}))


@pytest.fixture
def candidates(monkeypatch):
    """(token, feature) of each entry that a screen left open."""
    seen, compute = set(), screen_entries.compute_candidates_

    def computing(x, W, b, scale, floors, strict, values, keys, found):
        listed = keys[keys < len(x) * len(W)]
        seen.update(zip((listed // len(W)).tolist(), (listed % len(W)).tolist()))
        return compute(x, W, b, scale, floors, strict, values, keys, found)

    monkeypatch.setattr(screen_entries, "compute_candidates_", computing)
    return seen


def kept(encoder, way, k=4):
    """By batch or by token, or all that is above 0 as a dense matrix."""
    if way != "dense":
        return on_cpu(TRITON.select(encoder, None, Rule(k, way)))
    return SparseCodes.from_dense(TRITON.dense_above_threshold(encoder, torch.zeros((), device=DEVICE)).cpu())


def open_share(encoder):
    return encoder.operands.screen.looks.shares()["entries"]


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("long_rows")
@pytest.mark.parametrize("select", ["batch", "token"])
def test_many_numbers_a_token(select, repairs):
    """The bound grows with the root of d: three candidates for each entry kept here, nine for the k best of a token."""
    hints = ThresholdHints()
    for seed in range(1 if select == "token" else 2):  # without a hint, then with one
        encoder = triton_encoder(*drawn(B=16, d=4096, F=512, seed=seed))
        assert len(TRITON.select(encoder, None, Rule(2, select), hints).values) == 32
        assert 2 / 512 < open_share(encoder) < 20 / 512
    assert len(repairs) > 0
    assert not any(repairs)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("k", "looks"), [(4, True), (6, False)])
@pytest.mark.parametrize("select", ["batch", "token"])
def test_no_look_where_much_is_kept(select, k, looks, candidates):
    """One of fifty entries: 250 features, 4 or 6 for a token. What is not looked through counts as left open."""
    off, seen = both(*drawn(F=250))
    torch.testing.assert_close(*(kept(e, select, k).to_dense() for e in (off, seen)))
    assert (len(candidates) > 0) == looks
    assert (open_share(seen) < 1) == looks


@pytest.mark.parametrize("way", ["token", "dense"])
def test_tokens_of_zeros_leave_nothing_open(way, candidates):
    """Their products are 0 to the bit; what is open for one of them has a bias."""
    x, W, b = drawn()
    x[3:9] = 0
    b[1:] = 0
    b[0] = 0.5
    torch.testing.assert_close(*(kept(e, way).to_dense() for e in both(x, W, b)))
    assert {feature for token, feature in candidates if 3 <= token < 9} == {0}
    assert {token for token, _ in candidates} == set(range(len(x)))


@pytest.mark.parametrize("value", [1e-30, 1e-44])
def test_tokens_near_zero_are_no_tokens_of_zeros(value):
    x, W, b = drawn(B=4)
    x[:] = 0
    x[:, 0] = value
    W[:, 0] = 1.0
    case = (x, W, 0 * b)
    for way in ("token", "dense"):
        assert torch.equal(*(kept(e, way).to_dense() for e in both(*case)))


@pytest.mark.parametrize("way", ["batch", "token", "dense"])
def test_a_pruned_feature_is_no_candidate(way, candidates):
    x, W, b = drawn()
    b[7] = -torch.inf
    torch.testing.assert_close(*(kept(e, way).to_dense() for e in both(x, W, b)))
    assert len(candidates) > 0
    assert 7 not in {feature for _, feature in candidates}


def test_a_matrix_with_more_entries_than_a_token_is_thought_to_have(repairs, monkeypatch):
    """Room for a share of the matrix, however few entries a token is thought to have."""
    monkeypatch.setattr(stream, "ABOVE_PER_TOKEN", 1)
    off, seen = both(*drawn(F=640))
    threshold = 0.999 * TRITON.select(off, None, Rule(6, "batch")).values.amin()
    repairs.clear()
    expected, found = (TRITON.dense_above_threshold(e, threshold) for e in (off, seen))
    torch.testing.assert_close(found, expected)
    assert 6 * 16 <= int((found > 0).sum()) < 7 * 16
    assert repairs == [False]


def test_a_full_search_has_the_memory_of_the_chunks_before(monkeypatch):
    chunks, product_if_, looked, alive = screen_entries.seen_chunks, screen_entries.product_if_, [], []

    def noting(operands):
        for chunk, spread in chunks(operands):
            looked.extend(weakref.ref(t) for t in (chunk.z, spread.of_norms))
            yield chunk, spread

    def multiplying(*arguments):
        alive.extend(ref() is not None for ref in looked)
        product_if_(*arguments)

    monkeypatch.setattr(screen_entries, "seen_chunks", noting)
    monkeypatch.setattr(screen_entries, "product_if_", multiplying)
    kept(triton_encoder(*drawn()), "token")
    assert len(alive) > 0
    assert not any(alive)
