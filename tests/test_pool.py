"""`pool_every` and `score_tokens`: when the columns are scored, and from which tokens."""

import copy
from dataclasses import replace

import pytest
import torch
from makers import make_sae, tokens

from sampled_sae import SampledSAEConfig, reference
from sampled_sae.impl import pool as pools
from sampled_sae.impl.encoder import Operands, Share

IMPLS = ["torch", "reference", "triton"]


def of(impl, **changes):
    if impl == "triton":
        pytest.importorskip("triton")
    dtype = torch.float32 if impl == "triton" else torch.float64
    return make_sae(dtype, impl=impl, **changes), dtype


def members(sae, x):
    """The pool that the specification finds for x."""
    a = reference.encode(x.double() - sae.b_dec.double(), sae.W_enc.double(), sae.b_enc.double())
    return reference.candidate_pool(reference.column_scores(a, sae.cfg.score), sae.cfg.pool_size)


def outside(codes, pool):
    """Kept features that are not in the pool."""
    return set(codes.features.tolist()) - set(pool.tolist())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pool_serves_for_pool_every_steps(impl):
    sae, dtype = of(impl, pool_every=3)
    batches = [tokens(20, 12, dtype=dtype, seed=s) for s in range(7)]
    own = [members(sae, x) for x in batches]
    assert len({tuple(pool.tolist()) for pool in own}) == len(own)
    with torch.no_grad():
        for step, x in enumerate(batches):
            codes = sae(x).codes
            assert not outside(codes, own[step - step % 3])
            if step % 3:
                assert outside(codes, own[step])


def test_steps_between_score_nothing(monkeypatch):
    scored = []
    find = pools.find_pool
    monkeypatch.setattr(pools, "find_pool", lambda *a, **k: scored.append(1) or find(*a, **k))
    sae = make_sae(pool_every=4)
    for step in range(8):
        sae(tokens(20, 12, seed=step))
    assert len(scored) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_a_share_of_the_tokens(impl):
    sae, dtype = of(impl, score_tokens=0.3)
    x = tokens(20, 12, dtype=dtype)
    some = x[[0, 3, 6, 10, 13, 16]]
    pool = members(sae, some)
    assert not torch.equal(pool, members(sae, x))
    assert not outside(sae(x).codes, pool)
    assert torch.equal(sae._find_pool(sae._encoder_of(x)).members, pool)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, [0, 4, 8]), (1e-9, [0]), (0.5, [0, 2, 4, 6, 8, 10]), (1.0, None)]
)
def test_share_of(share, expected):
    x, expected = torch.arange(12.0)[:, None], list(range(12)) if expected is None else expected
    whole = Operands(x, torch.ones(3, 1), torch.ones(3))
    assert pools.share_of(whole, share).tolist() == expected
    found = []
    for first, stop in ((0, 5), (5, 5), (5, 6), (6, 12)):  # the same of a batch in pieces
        part = whole._replace(x=x[first:stop], share=Share(12, 3, first))
        found += (pools.share_of(part, share) + first).tolist()
    assert found == expected


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_kept_scores_serve_the_aux_loss(impl):
    """The bounded pool of dead features comes from the scores of the kept pool, in every implementation."""
    changes = {"pool_every": 2, "aux_coefficient": 1.0, "dead_after": 50, "aux_pool": 5}
    sae, dtype = of(impl, **changes)
    exact, _ = of("reference", **changes)
    exact.load_state_dict({name: t.to(exact.state_dict()[name].dtype) for name, t in sae.state_dict().items()})
    for s in (sae, exact):
        s.tokens_since_active[::2] = 100
    for step in range(4):
        x = tokens(20, 12, dtype=dtype, seed=step)
        ours, theirs = sae(x).aux, exact(x.double()).aux
        assert theirs > 0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=0)


def test_the_kept_pool_travels_with_a_checkpoint():
    sae = make_sae(pool_every=3, pool="sample")
    assert sae.memory.pool.state_dict() == {}
    sae(tokens(20, 12))
    twin = make_sae(pool_every=3, pool="sample")
    twin.load_state_dict(sae.state_dict())
    twin.memory.pool.load_state_dict(copy.deepcopy(sae.memory.pool.state_dict()), "cpu")
    twin.generator.set_state(sae.generator.get_state())
    for step in range(6):
        x = tokens(20, 12, seed=10 + step)
        assert torch.equal(sae(x).codes.to_dense(), twin(x).codes.to_dense())
    twin.memory.pool.load_state_dict({}, "cpu")
    assert twin.memory.pool.state_dict() == {}


@pytest.mark.parametrize(
    ("first", "then", "searches"),
    [
        ({"pool_every": 1}, {"pool_every": 3}, [0, 1, 2, 5]),
        ({"pool_every": 4}, {"pool_every": 1}, [0, 2, 3, 4, 5]),
        ({"pool_every": 10}, {"pool_every": 2}, [0, 2, 4]),
        ({"pool_every": 10}, {"score": "entropy"}, [0, 2]),
        ({"pool_every": 10}, {"l": 5.0}, [0, 2]),
        ({"pool_every": 10}, {"k": 7}, [0, 2]),
    ],
    ids=str,
)
def test_a_config_set_later_is_honoured(first, then, searches):
    """Of six steps, those that look for a pool; the config changes before the third."""
    sae, found = make_sae(**first), []
    look = sae._find_pool
    sae._find_pool = lambda encoder: found.append(step) or look(encoder)
    for step in range(6):
        if step == 2:
            sae.cfg = replace(sae.cfg, **then)
        out = sae(tokens(20, 12, seed=step))
    assert found == searches
    assert len(out.codes.active_features()) <= sae.cfg.pool_size
    assert out.codes.count() <= 20 * sae.cfg.k


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda cfg: replace(cfg, d_sae=97), ValueError, "cfg: d_sae=97: the weights are of d_sae=96"),
        (
            lambda cfg: replace(cfg, d_in=13, d_out=5, apply_b_dec_to_input=None),
            ValueError,
            "cfg: d_in=13, d_out=5: the weights are of d_in=12, d_out=None",
        ),
        (lambda cfg: cfg.to_dict(), TypeError, "cfg={'d_in': 12"),
        (lambda cfg: None, TypeError, "cfg=None: must be a SampledSAEConfig"),
    ],
)
def test_a_config_that_the_weights_do_not_fit_is_refused(change, error, words):
    sae = make_sae()
    before = sae.cfg
    with pytest.raises(error, match=words):
        sae.cfg = change(before)
    assert sae.cfg == before


def test_what_a_cuda_graph_would_freeze_is_refused(monkeypatch):
    monkeypatch.setattr(pools, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"pool_every=3: .* must be 1"):
        make_sae(pool_every=3)(tokens(8, 12))
    make_sae(pool_every=1)(tokens(8, 12))


@pytest.mark.parametrize("rule", [{"l": None}, {"l": 24.0}])
def test_no_pool_no_scores(rule):
    sae, plain = make_sae(pool_every=4, score_tokens=0.1, **rule), make_sae(**rule)
    for step in range(3):
        x = tokens(20, 12, seed=step)
        assert torch.equal(sae(x).codes.to_dense(), plain(x).codes.to_dense())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("pool_every", 0, "pool_every=0"),
        ("pool_every", 1.5, "pool_every=1.5"),
        ("score_tokens", 0, r"score_tokens=0: must be a finite number in \(0, 1\]"),
        ("score_tokens", 1.1, "score_tokens=1.1"),
    ],
)
def test_bad_settings(field, value, words):
    with pytest.raises((ValueError, TypeError), match=words):
        SampledSAEConfig(d_in=4, d_sae=8, k=2, **{field: value})
