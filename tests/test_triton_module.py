"""`SampledSAE(impl="triton")`: over steps, under autocast, compiled, without a wait for the device."""

import copy

import pytest
import torch
from makers import assert_same_entries, gradients, in_each_form, make_sae, tokens
from no_host_sync import seen_in_steps

pytest.importorskip("triton")


pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(impl="triton", **settings):
    """Two tiles of features in the interpreter, the second one not full."""
    return make_sae(torch.float32, device=DEVICE, impl=impl, **{"d_sae": 48, **settings})


def sae_pair(**settings):
    """The same SAE as impl="triton" and impl="torch"."""
    made = [make(impl, **settings) for impl in ("triton", "torch")]
    assert [sae.impl_in_use for sae in made] == ["triton", "torch"]
    return made


MODULE_RULES = [
    {"l": 3.0},
    {"l": 3.0, "select": "token", "score": "entropy"},
    {"l": None},
    {"l": None, "select": "token"},
    {"l": 3.0, "apply_b_dec_to_input": False, "input_scale": 0.37},
    {"l": 3.0, "groups": (5, 20, 48)},
    {"l": None, "groups": (5, 20, 48)},
]


@pytest.mark.one_in(3)
@in_each_form(MODULE_RULES, without_pool="entries")
def test_module_equals_the_torch_form_over_steps(rule, form):
    """Losses, gradients, threshold and dead counts, with the aux loss from the third step on."""
    ours, theirs = sae_pair(aux_coefficient=0.5, dead_after=25, k_aux=3, aux_pool=20, **rule)
    for seed in range(4):
        x = tokens(12, 12, dtype=torch.float32, seed=seed).to(DEVICE)
        out, expected = ours(x), theirs(x)
        assert_same_entries(out.codes, expected.codes)
        for name in ("loss", "mse", "aux", "x_hat"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), msg=lambda m, n=name: f"{n}: {m}")
        for sae, o in ((ours, out), (theirs, expected)):
            sae.zero_grad()
            o.loss.backward()
        for name, gradient in gradients(theirs).items():
            torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
        assert ours.W_enc.grad.stride() == ours.W_enc.stride()
    assert expected.aux > 0
    assert torch.equal(ours.tokens_since_active, theirs.tokens_since_active)
    assert torch.equal(ours.threshold_steps, theirs.threshold_steps)
    torch.testing.assert_close(ours.threshold, theirs.threshold)
    for sae in (ours, theirs):
        sae.calibrate(x, 3)
    torch.testing.assert_close(ours.threshold, theirs.threshold)
    ours.threshold.copy_(theirs.threshold)
    assert_same_entries(ours.eval().encode_sparse(x), theirs.eval().encode_sparse(x))
    torch.testing.assert_close(ours(x).x_hat, theirs(x).x_hat)


AUX = [(3.0, aux_pool, n_dead) for aux_pool in (1, 7, 48, 1000, None) for n_dead in (0, 1, 9, 48)]
AUX += [(None, 1, 48), (None, 7, 9), (None, 48, 0), (None, 1000, 9), (None, None, 1)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("l", "aux_pool", "n_dead"), AUX)
def test_aux_loss(l, aux_pool, n_dead):
    ours, theirs = sae_pair(l=l, aux_coefficient=1.0, dead_after=50, k_aux=2, aux_pool=aux_pool)
    x = tokens(12, 12, dtype=torch.float32).to(DEVICE)
    found = []
    for sae in (ours, theirs):
        sae.tokens_since_active[:n_dead] = 50
        out = sae(x)
        if n_dead:
            out.aux.backward()
            found.append((out.aux.detach(), [sae.get_parameter(n).grad for n in ("W_enc", "b_enc", "W_dec")]))
        else:
            assert out.aux == 0
    if n_dead:
        assert found[0][0] > 0
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.one_in(3)
@in_each_form(MODULE_RULES[:4])
def test_row_gradients_are_the_rows_of_the_dense_ones(rule, form):
    rows, dense = (make(row_grads=keep, **rule) for keep in (True, False))
    x = tokens(5, 12, dtype=torch.float32).to(DEVICE)
    for sae in (rows, dense):
        sae(x).loss.backward()
    assert rows.W_enc.grad is rows.W_dec.grad is rows.b_enc.grad is None
    seen = set()
    for g in rows.row_grads:
        expected = dense.get_parameter(g.name).grad
        expected = expected.t() if g.name == "W_enc" else expected
        whole = torch.zeros_like(expected).index_copy_(0, g.features, g.rows.grad)
        torch.testing.assert_close(whole, expected)
        assert (g.features.diff() > 0).all()
        seen.add(g.name)
    assert seen == {"W_enc", "b_enc", "W_dec"}


def test_more_features_than_slots(monkeypatch):
    """Rows of the gradient are then chosen among the features: as many as there are slots."""
    ours, theirs = sae_pair(l=None, k=1, row_grads=True)
    x = tokens(7, 12, dtype=torch.float32).to(DEVICE)
    for sae in (ours, theirs):
        sae(x).loss.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        wholes = []
        for sae in (ours, theirs):
            p = sae.get_parameter(name).detach()
            whole = torch.zeros_like(p.t() if name == "W_enc" else p)
            (g,) = [g for g in sae.row_grads if g.name == name]
            wholes.append(whole.index_copy_(0, g.features, g.rows.grad))
        assert len(next(g for g in ours.row_grads if g.name == name).features) == 7
        torch.testing.assert_close(*wholes, rtol=1e-4, atol=1e-6)


@pytest.mark.one_in(3)
@in_each_form(MODULE_RULES[:3])
def test_autocast_takes_16_bit_products_and_keeps_float32_gradients(rule, form):
    ours, theirs = sae_pair(**rule)
    x = tokens(64, 12, dtype=torch.float32).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ours(x)
    expected = theirs(x)
    assert out.x_hat.dtype == out.codes.values.dtype == torch.float32
    assert 1e-6 < abs(out.mse - expected.mse) / expected.mse < 0.02
    for o in (out, expected):
        o.loss.backward()
    for name, gradient in gradients(ours).items():
        other = theirs.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.95


@pytest.mark.one_in(3)
@in_each_form(MODULE_RULES[:3])
def test_float16_loses_no_gradient_to_its_range(rule, form):
    """A mean over many tokens makes gradients smaller than float16 has numbers for, a scaled loss larger ones."""
    found = []
    for scale in (1.0, 1e-6, 1e6):
        sae = make(**rule)
        with torch.autocast(DEVICE, torch.float16):
            out = sae(tokens(64, 12, dtype=torch.float32).to(DEVICE))
        (scale * out.loss).backward()
        found.append({name: gradient / scale for name, gradient in gradients(sae).items()})
    for name, gradient in found[0].items():
        for scaled in found[1:]:
            torch.testing.assert_close(scaled[name], gradient, rtol=0.02, atol=float(2e-3 * gradient.abs().max()))


@pytest.mark.one_in(5)
@in_each_form(MODULE_RULES, without_pool="entries")
@pytest.mark.parametrize("dead_after", [10, 10**7])
def test_no_step_waits_for_the_device(rule, dead_after, form, monkeypatch):
    sae = make(aux_coefficient=1.0, dead_after=dead_after, **rule)
    seen = seen_in_steps(sae, tokens(12, 12, dtype=torch.float32).to(DEVICE), monkeypatch)
    assert "decode_block" in seen or "decode_entries" in seen
    assert "sort" in seen or "decode_block" in seen


COMPILED = [(MODULE_RULES[i], "aot_eager") for i in (0, 2, 3, 4, 6)] + [(MODULE_RULES[i], "inductor") for i in (0, 3)]


@pytest.mark.one_in(7)
@pytest.mark.parametrize(("rule", "backend"), COMPILED, ids=str)
def test_a_training_step_compiles_whole(rule, backend):
    sae = make(aux_coefficient=1.0, dead_after=20, **rule)
    twin = copy.deepcopy(sae)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for seed in range(3):
        x = tokens(12, 12, dtype=torch.float32, seed=seed).to(DEVICE)
        expected, found = sae(x), compiled(x)
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.x_hat, expected.x_hat)
        assert_same_entries(found.codes, expected.codes)
        for module, out in ((sae, expected), (twin, found)):
            module.zero_grad()
            out.loss.backward()
        for name, gradient in gradients(sae).items():
            torch.testing.assert_close(twin.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert expected.aux > 0
    for name in ("threshold", "threshold_steps", "tokens_since_active"):
        torch.testing.assert_close(sae.get_buffer(name), twin.get_buffer(name))
