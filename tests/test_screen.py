"""Looking through bfloat16 products changes no pool and no kept pair, and its bounds hold."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import make_sae, tokens
from screened import SCORED, TORCH, assert_same_members, assert_same_pairs, assert_same_steps, both, encoders

from sampled_sae.impl.column_bounds import largest_columns
from sampled_sae.impl.encoder import Operands
from sampled_sae.impl.hints import Rule, ThresholdHints
from sampled_sae.impl.pool import REST, PoolRule, find_pool
from sampled_sae.impl.torch import bounded_screen, screen, screen_columns, search, stream

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
long = settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def check(case, k, l):
    off, seen = both(*case[:4])
    n_features = off.shape[1]
    for select in ("batch", "token"):
        rule, hints = Rule(min(k, n_features), select), [ThresholdHints(), ThresholdHints()]
        for _ in range(2):  # without a hint, then with one
            codes = [TORCH.select(e, None, rule, h) for e, h in zip((off, seen), hints)]
            assert_same_pairs(case, *codes, by_token=select == "token")
    for tau in (0.0, float(codes[0].smallest()) if codes[0].count() else 1.0):
        assert_same_pairs(case, *(TORCH.above_threshold(e, torch.tensor(tau)) for e in (off, seen)), threshold=tau)
    for score, pool in SCORED:
        bounds = TORCH.column_bounds(seen.operands, score)
        scores = TORCH.column_scores(off.operands, score)
        if bounds is not None:
            slack = 1e-5 * scores.abs() + 1e-30
            assert (bounds.low <= scores + slack).all()
            assert (scores <= bounds.high + slack).all()
        rule = PoolRule(k, l, score, pool)
        pools = [find_pool(TORCH, e.operands, rule, torch.Generator().manual_seed(3)) for e in (off, seen)]
        if pools[0] is None:
            continue
        assert_same_members(case, rule, *(found.members for found in pools))


@pytest.mark.everyday
@quick
@given(encoders(), st.integers(1, 8), st.sampled_from([1.0, 2.0, 4.0]))
def test_the_same_pool_and_pairs(case, k, l):
    check(case, k, l)


@pytest.mark.slow
@long
@given(encoders(), st.integers(1, 8), st.sampled_from([1.0, 2.0, 4.0]))
def test_the_same_pool_and_pairs_of_many_problems(case, k, l):
    check(case, k, l)


def planted():
    """An activation as far from what is seen of it as the bound allows: 0 is seen where 2^-8 is true."""
    x = torch.tensor([[1.0, 0.0]])
    W, b = torch.zeros(64, 2), torch.zeros(64)
    W[5, 0], b[5] = 1 + 2.0**-8 - 2.0**-20, -1
    return x, W, b


def narrower(monkeypatch, share):
    for module in (bounded_screen, screen, screen_columns, search):
        for name in {"MARGIN", "UNIT"} & set(vars(module)):
            monkeypatch.setattr(module, name, share * getattr(module, name))


@pytest.mark.parametrize(("share", "found"), [(1.0, True), (0.9, False)])
def test_the_entry_bound_is_needed(share, found, monkeypatch):
    x, W, b = planted()
    narrower(monkeypatch, share)
    seen = TORCH.encoder(x, W, b, screen="bf16")
    true = float(TORCH.above_threshold(TORCH.encoder(x, W, b, screen="off"), torch.tensor(0.001)).values[0])
    assert true == 2.0**-8 - 2.0**-20
    just_below = torch.tensor(true).nextafter(torch.tensor(0.0))
    assert len(TORCH.above_threshold(seen, just_below).values) == found
    looking = stream.BatchSearch(seen.operands, 1)
    looking.look_at(0, seen.operands, slice(0, 64), just_below[None])
    assert len(looking.settle(just_below[None]).values) == found


def test_what_is_seen_below_its_bound_is_computed_too():
    """Its bound is rounded to the nearest number of bfloat16, here down to 307200, below the activation beside it."""
    x, W, b = torch.tensor([[440.0]]), torch.zeros(64, 1), torch.zeros(64)
    W[5], b[5], W[9], b[9] = 700, -669, 698, 463
    encoder, hints = TORCH.encoder(x, W, b, screen="bf16"), ThresholdHints()
    for _ in range(2):  # without a hint, then with one
        assert TORCH.select(encoder, None, Rule(1, "token"), hints).features.tolist() == [9]


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (0.9, False)])
def test_the_column_bound_is_needed(share, holds, monkeypatch):
    x, W, b = torch.tensor([[1.0, 2.0**-8]]), torch.zeros(64, 2), torch.zeros(64)
    W[5] = torch.tensor([1 + 2.0**-8 - 2.0**-20, 1.0])  # 1 is seen where 1 + 2^-7 is true
    narrower(monkeypatch, share)
    bounds = TORCH.column_bounds(TORCH.encoder(x, W, b, screen="bf16").operands, "l2")
    assert (float(bounds.high[5]) >= 1 + 2.0**-7 - 2.0**-20) == holds


def test_a_spectral_bound_is_one_and_not_a_loose_one():
    for seed, shape in enumerate([(1, 1), (3, 40), (200, 30), (64, 64)]):
        X = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -2, shape[1])
        X = X.bfloat16()
        exact = float(torch.linalg.matrix_norm(X.double(), 2))
        assert exact <= screen_columns.spectral_bound(X) <= 1.2 * exact


@pytest.mark.parametrize("value", [float("inf"), 3e38, 1e30, 1e-40])
def test_values_at_the_ends_of_float32(value):
    x, W, b = torch.ones(3, 4), torch.eye(4).repeat(16, 1), torch.zeros(64)
    W[7, 1] = value
    off, seen = both(x, W, b, None)
    for threshold in (0.5, 1e-41):
        codes = [TORCH.above_threshold(e, torch.tensor(threshold)) for e in (off, seen)]
        assert torch.equal(codes[0].features, codes[1].features)
    pools = [find_pool(TORCH, e.operands, PoolRule(2, 1)) for e in (off, seen)]
    assert torch.equal(pools[0].members, pools[1].members)


def test_what_the_screen_leaves_open_is_computed_in_full(monkeypatch):
    """Columns that all tie in bfloat16, and a threshold that lets most entries through."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    W = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)) * (1 + 1e-6 * torch.arange(128.0)[:, None])
    off, seen = both(x, W, torch.zeros(128), None)
    pools = [find_pool(TORCH, e.operands, PoolRule(4, 2)) for e in (off, seen)]
    assert torch.equal(pools[0].members, pools[1].members)
    looking = stream.BatchSearch(seen.operands, 8)
    looking.look_at(0, seen.operands, slice(0, 128), torch.tensor([1e-3]))
    assert not looking.screening


@pytest.mark.parametrize("select", ["batch", "token"])
@pytest.mark.parametrize(("k", "looks"), [(5, True), (6, False)])
def test_what_keeps_more_than_a_look_may_leave_is_not_looked_through(select, k, looks):
    """A 64th of 320 features are 5; more come from the chunks themselves, as without a screen."""
    g = torch.Generator().manual_seed(0)
    pair = both(torch.randn(32, 8, generator=g), torch.randn(320, 8, generator=g), torch.zeros(320), None)
    hints = [ThresholdHints(), ThresholdHints()]
    for _ in range(2):
        off, seen = (TORCH.select(e, None, Rule(k, select), h) for e, h in zip(pair, hints))
        assert torch.equal(off.features, seen.features)
    assert (pair[1].operands.screen.looks.entries > 0) == looks
    assert looks or torch.equal(off.values, seen.values)


@pytest.mark.parametrize("select", ["batch", "token"])
def test_a_look_in_vain_counts_each_entry_once(select):
    """All columns are one up to what bfloat16 can tell: a look leaves open what the tokens above the floor have."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(8, 8, generator=g), torch.randn(1, 8, generator=g) * (1 + 1e-6 * torch.arange(512.0)[:, None])
    seen, hints = TORCH.encoder(x, W, torch.zeros(512), screen="bf16"), ThresholdHints()
    for _ in range(2):  # without a hint, then with one
        TORCH.select(seen, None, Rule(4, select), hints)
        assert seen.operands.screen.looks.shares()["entries"] == 1


@pytest.mark.parametrize("select", ["batch", "token"])
def test_what_is_found_does_not_depend_on_what_was_known(select):
    """With a hint other chunks are screened than without; pairs of features tie up to float32's rounding."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(2048, 64, generator=g), dim=1).repeat(2, 1)
    W[2048:] *= 1 + 1e-7 * torch.randn(2048, 1, generator=g)
    rule, hints = Rule(15, select), ThresholdHints()
    for _ in range(3):
        encoder = TORCH.encoder(torch.randn(1024, 64, generator=g), W, torch.zeros(len(W)), screen="bf16")
        known, unknown = (TORCH.select(encoder, None, rule, h) for h in (hints, ThresholdHints()))
        assert torch.equal(known.features, unknown.features)
        assert torch.equal(known.values, unknown.values)


def test_columns_whose_score_is_known_are_not_computed_again():
    """The score "uniform" is 0 or 1, and near the pool's boundary many are 1."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    bounds = TORCH.column_bounds(TORCH.encoder(x, x, torch.ones(64), screen="bf16").operands, "uniform")
    asked = []
    counted = bounds._replace(exact=lambda at: asked.append(at) or bounds.exact(at))
    assert largest_columns(counted, 8).tolist() == list(range(8))
    assert [at.tolist() for at in asked] == [[]]


@pytest.mark.parametrize(
    "rule", [{"l": 4.0}, {"l": None}, {"l": None, "select": "token"}, {"l": 2.0, "pool": "sample"}]
)
def test_training_takes_the_same_steps(rule):
    """With dead features."""
    more = {"aux_coefficient": 1.0, "dead_after": 60, "aux_pool": 8, "row_grads": True}
    assert_same_steps(lambda screen: make_sae(torch.float32, screen=screen, **more, **rule), 20)


def test_auto_screens_large_products_alone(monkeypatch):
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: True)
    x, W = torch.ones(1024, 2), torch.ones(1024, 2)
    assert screen.rounded(x, W, "auto") is not None
    for operands in ((x[:8], W), (x[:255], W.repeat(8, 1)), (x.double(), W.double())):
        assert screen.rounded(*operands, "auto") is None
    assert screen.rounded(x, W.bfloat16(), "auto") is not None
    monkeypatch.setattr(screen, "fast_bfloat16", lambda: False)
    assert screen.rounded(x, W, "auto") is None


def test_operands_of_some_tokens_and_features_keep_their_screen():
    x, W, b = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(9)
    operands = TORCH.encoder(x, W, b, screen="bf16").operands
    assert torch.equal(operands.of_tokens(slice(2, 4)).screen.x, x[2:4].bfloat16())
    assert operands.of_features(torch.tensor([1, 3])).screen is operands.screen
    assert operands.in_full().screen is None
    assert isinstance(operands.among(torch.arange(3)), Operands)


def test_a_screen_that_leaves_too_much_open_rests(monkeypatch):
    """Columns that all but tie: the next batches are scored in full, and a checkpoint knows for how long."""
    sae = make_sae(torch.float32, screen="bf16")
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, :1].expand(-1, 96).clone())
        sae.b_enc.zero_()
    looks = []
    bounds = screen_columns.norms
    monkeypatch.setattr(screen_columns, "norms", lambda operands: looks.append(1) or bounds(operands))
    for seed in range(5):
        sae(tokens(32, 12, seed=seed).float())
    assert len(looks) == 1
    kept = make_sae(torch.float32, screen="bf16").memory.pool
    kept.load_state_dict(sae.memory.pool.state_dict(), "cpu")
    assert kept.rest == sae.memory.pool.rest == REST - 4
