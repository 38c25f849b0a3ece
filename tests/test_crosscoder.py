"""Steps of crosscoders, one set of features for several layers side by side, in every implementation."""

import pytest
import torch
from crosscoder_makers import RULES, D, L, batch, make, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import gradients, make_sae, problem, state_of, tokens
from optim_steps import assert_close, plain_step

from sampled_sae import RowAdam, SampledSAE, SampledSAEConfig, reference
from sampled_sae.impl.decoder_rows import layer_norms, normalize_, without_growth

AUX = {"aux_coefficient": 0.5, "dead_after": 15, "k_aux": 3, "aux_pool": 20}
NORMS = torch.ones(96, dtype=torch.float64)


def test_norms_and_the_reconstruction_by_hand():
    W_dec = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
    assert reference.norm_sums(W_dec, 2).tolist() == [5.0, 3.0]
    assert reference.norm_sums(W_dec, 1).tolist() == [5.0, pytest.approx(5**0.5)]
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 0.0]]])
    W_enc = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.5]])
    c, x_hat = reference.crosscode(x, W_enc, torch.zeros(2), W_dec, torch.zeros(4), k=1, l=None)
    # activations (1, 1.5) and (0, 4): times the sums (5, 4.5) and (0, 12), of which two are kept
    assert torch.equal(c, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    assert torch.equal(x_hat, torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 8.0]]]))


@pytest.mark.parametrize("l", [1.5, None])
def test_gradients_of_the_specification(l):
    t = [value.requires_grad_() for value in problem(4, 6, 7, seed=3).values()]

    def loss(x, W_enc, b_enc, W_dec, b_dec):
        x = x.view(4, 3, 2)
        return reference.reconstruction_loss(
            *(y.flatten(1) for y in (x, reference.crosscode(x, W_enc, b_enc, W_dec, b_dec, k=2, l=l)[1]))
        )

    assert torch.autograd.gradcheck(loss, t)


def specified(sae, x):
    """(loss with the aux loss of the features that are dead, x_hat, gradients) by the specification."""
    c, leaves = sae.cfg, {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    x = scaled(sae, x)
    seen = x - leaves["b_dec"] if c.apply_b_dec_to_input else x
    weights = [leaves[name] for name in ("W_enc", "b_enc", "W_dec")]
    rule = {"k": c.k, "l": c.l, "score": c.score, "select": c.select}
    codes, x_hat = reference.crosscode(seen.view(-1, L, D), *weights, leaves["b_dec"], **rule)
    levels = reference.decode_levels(codes, leaves["W_dec"], leaves["b_dec"], c.groups or (c.d_sae,))
    torch.testing.assert_close(x_hat.flatten(1), levels[:, -1])
    a = reference.encode(seen, leaves["W_enc"], leaves["b_enc"])
    dead = {"k_aux": c.k_aux, "aux_pool": c.aux_pool, "scores": reference.column_scores(a, c.score)}
    aux = reference.aux_loss(x, x_hat.flatten(1).detach(), seen, *weights, sae.dead, **dead)
    loss = reference.nested_loss(x, levels) + c.aux_coefficient * aux
    loss.backward()
    return loss.detach(), x_hat.detach(), {n: t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_is_that_of_the_specification(rule, impl):
    sae = make(impl=impl, **rule, **AUX)
    sae.tokens_since_active[::3] = 20
    x = batch(3, 5)
    loss, x_hat, expected = specified(sae, x)
    out = sae(x)
    assert out.aux > 0
    assert out.x_hat.shape == x.shape
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(scaled(sae, out.x_hat), x_hat.flatten(1))
    torch.testing.assert_close(out.mse, (scaled(sae, x) - x_hat.flatten(1)).square().sum(1).mean())
    torch.testing.assert_close(sae.decode(out.codes), out.x_hat.flatten(0, 1))
    out.loss.backward()
    torch.testing.assert_close(gradients(sae), expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_triton_equals_torch(rule):
    pytest.importorskip("triton")
    rule = {**rule, "groups": (10, 48)} if "groups" in rule else rule
    saes = [make(torch.float32, d_sae=48, impl=impl, row_grads=True, **rule, **AUX) for impl in ("triton", "torch")]
    optimizers = [RowAdam(sae, lr=0.01) for sae in saes]
    for step in range(3):
        outs = []
        for sae, optimizer in zip(saes, optimizers):
            optimizer.zero_grad()
            sae.tokens_since_active[::3] = 20
            outs.append(sae(batch(9, dtype=torch.float32, seed=step)))
            outs[-1].loss.backward()
            optimizer.step()
        assert outs[0].aux > 0
        for name in ("loss", "mse", "aux", "x_hat"):
            torch.testing.assert_close(*(getattr(out, name) for out in outs), rtol=1e-4, atol=1e-5)
        assert_close(*map(state_of, saes), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck_of_the_layer(impl):
    sae = make(d_in=2, d_sae=8, k=2, l=None, impl=impl)
    names, leaves = zip(*((n, p.detach().clone().requires_grad_()) for n, p in sae.named_parameters()))

    def loss(x, *leaves):
        return torch.func.functional_call(sae, dict(zip(names, leaves)), (x,)).loss

    assert torch.autograd.gradcheck(loss, (tokens(5, L, 2).requires_grad_(), *leaves))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_layer_is_every_crosscoder_in_other_units(data):
    """Of weights with any norms: the same entries are kept once the sums of the norms are moved into the encoder."""
    B, n, layers, d = (data.draw(st.integers(1, most)) for most in (7, 40, 4, 3))
    k, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 999))
    rule = {"k": k, "l": data.draw(st.sampled_from([1.0, 2.5, None])), "score": data.draw(st.sampled_from(["l2"]))}
    rule["select"] = data.draw(st.sampled_from(["batch", "token"]))
    t = problem(B, layers * d, n, seed=seed)
    x = t.pop("x").view(B, layers, d)
    c, x_hat = reference.crosscode(x, **t, **rule)
    sae = SampledSAE(SampledSAEConfig(d_in=d, d_sae=n, layers=layers, apply_b_dec_to_input=False, **rule)).double()
    sums = reference.norm_sums(t["W_dec"], layers)
    with torch.no_grad():
        for name, value in t.items():
            getattr(sae, name).copy_(value)
        sae.W_enc.mul_(sums)
        sae.b_enc.mul_(sums)
        sae.normalize_decoder()
    out = sae(x if layers > 1 else x[:, 0])
    torch.testing.assert_close(out.codes.to_dense(), c * sums)
    torch.testing.assert_close(out.x_hat.view(x.shape), x_hat)


def test_one_layer_is_an_sae():
    plain, one = make_sae(**AUX), make_sae(layers=1, **AUX)
    assert plain.cfg == one.cfg
    assert not one.cfg.is_crosscoder
    assert "layers" not in one.cfg.to_dict()
    W, grad = tokens(6, 5), tokens(6, 5, seed=2)
    torch.testing.assert_close(normalize_(W.clone(), 1).norm(dim=1), torch.ones(6).double())
    unit = torch.nn.functional.normalize(W, dim=1)
    torch.testing.assert_close(without_growth(grad, W, 1), grad - (grad * unit).sum(1, keepdim=True) * unit)


def test_the_gradient_keeps_the_sum_of_the_norms():
    W = normalize_(tokens(6, L * D), L)
    step = without_growth(tokens(6, L * D, seed=2), W, L)
    sums = layer_norms(W + 1e-6 * step, L).sum(1)
    assert (sums - 1).abs().max() < 1e-10  # second order
    torch.testing.assert_close(without_growth(step, W, L), step)
    # a feature without any row in a layer has a gradient there
    W[0, :D] = 0
    assert torch.isfinite(without_growth(step, W, L)).all()


def test_no_rows_of_a_decoder():
    nothing = torch.ones(0, 6)
    assert layer_norms(nothing, 3).shape == (0, 3)
    assert normalize_(nothing, 3).shape == without_growth(nothing, nothing, 3).shape == (0, 6)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("mode", ["dense", "lazy", "decayed"])
@pytest.mark.parametrize("row_grads", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_row_adam(mode, row_grads, impl):
    """In mode "dense" as clip, project, Adam and normalise; in the others rows without gradient stay to the bit."""
    if impl == "triton":
        pytest.importorskip("triton")
    dtype = torch.float32 if impl == "triton" else torch.float64
    rule = {"d_sae": 48, "l": 2.0, **AUX} if impl == "triton" else AUX
    ours, other = make(dtype, impl=impl, row_grads=row_grads, **rule), make(dtype, **rule)
    optimizer, adam = RowAdam(ours, lr=0.01, mode=mode), torch.optim.Adam(other.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        adam.zero_grad()
        for sae in (ours, other):
            sae(batch(10, dtype=dtype, seed=step)).loss.backward()
        before = ours.W_dec.detach().clone()
        optimizer.step()
        still = (ours.W_dec == before).all(1)
        touched = other.W_dec.grad.ne(0).any(1)
        plain_step(other, adam, 1.0)
        if mode == "dense":
            assert_close(state_of(ours), state_of(other), rtol=1e-3 if impl == "triton" else 1e-5, atol=1e-6)
        elif step == 0:
            assert torch.equal(still, ~touched)
    torch.testing.assert_close(ours.layer_norms().sum(1), NORMS[: len(ours.W_dec)].to(dtype))
