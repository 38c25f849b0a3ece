"""One training step against SAELens' own, from the same weights on the same batch."""

import copy

import pytest
import torch
from saelens_makers import KINDS, D, F, Largest, dead_mask, in_float64, pair, relative_error, step, step_input, tokens

from sampled_sae.integrations import saelens
from sampled_sae.integrations.saelens import dead_feature_loss as dead

RTOL = {torch.float32: 2e-5, torch.float64: 1e-12}


def assert_same_step(kind, mask=None, dtype="float32", n=50, steps=2, **changes):
    theirs, ours = pair(kind, dtype, **changes)
    for number in range(steps):
        x = tokens(n, seed=number, dtype=theirs.dtype)
        expected, expected_grads = step(theirs, x, mask, number)
        output, grads = step(ours, x, mask, number)
        rtol = RTOL[theirs.dtype]
        assert list(output.losses) == list(expected.losses)
        for name, loss in expected.losses.items():
            torch.testing.assert_close(output.losses[name], loss, rtol=rtol, atol=1e-7, msg=name)
        torch.testing.assert_close(output.loss, expected.loss, rtol=rtol, atol=0)
        torch.testing.assert_close(output.sae_out, expected.sae_out, rtol=rtol, atol=10 * rtol)
        acts = output.feature_acts.to_dense()
        assert not output.feature_acts.requires_grad
        torch.testing.assert_close(acts, expected.feature_acts.detach(), rtol=rtol, atol=10 * rtol)
        for name, grad in expected_grads.items():
            error = (grads[name] - grad).norm() / grad.norm().clamp_min(1e-30)
            assert error < 5 * rtol, (name, float(error))
    if kind != "topk":
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=rtol, atol=0)
        assert output.metrics["topk_threshold"] is ours.topk_threshold
        assert float(ours.topk_threshold) > 0


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [None, 0, 5, 12, 40, 100, F])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind, n_dead, rescale):
    """k_aux is 12: fewer dead than that (negative activations and a smaller loss), dense and listed entries, all."""
    assert_same_step(kind, dead_mask(n_dead), rescale_acts_by_decoder_norm=rescale)


def test_dead_features_in_several_chunks_of_tokens(monkeypatch):
    monkeypatch.setattr(dead, "CHUNK_ELEMENTS", 700)
    assert_same_step("batchtopk", dead_mask(100))


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    assert_same_step(kind, dead_mask(100), dtype="float64")
    assert_same_step(kind, dead_mask(30), dtype="float64", apply_b_dec_to_input=False)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_small_batches(kind, n):
    assert_same_step(kind, dead_mask(90), n=n)


@pytest.mark.parametrize(("k", "n"), [(0.3, 7), (1 / 3, 10), (2.999, 50), (0.01, 50)])
def test_float_k_keeps_as_many_as_saelens(k, n):
    """int(k * n), not the nearest whole number; none at all in the last case."""
    theirs, ours = pair("batchtopk", k=k)
    x = tokens(n)
    expected = step(theirs, x)[0].feature_acts
    assert step(ours, x)[0].feature_acts._nnz() == int((expected != 0).sum()) == int(k * n)
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=2e-5, atol=0)


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_aux_coefficient(coefficient):
    assert_same_step("batchtopk", dead_mask(100), aux_loss_coefficient=coefficient)


def test_dead_features_that_are_all_negative_take_part():
    """SAELens looks at activations before the relu."""
    theirs, ours = pair("batchtopk")
    for sae in (theirs, ours):
        sae.b_enc.data[dead_mask(100)] = -50
    x = tokens()
    expected, expected_grads = step(theirs, x, dead_mask(100))
    output, grads = step(ours, x, dead_mask(100))
    assert expected.losses["auxiliary_reconstruction_loss"] > 100
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=0)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("n_dead", [30, 100])
def test_ties_among_the_dead_keep_exactly_k_aux(n_dead):
    """Equal features: which of them reconstruct does not change the loss, how many does."""
    theirs, ours = pair("topk", dtype="float64")
    for sae in (theirs, ours):
        with torch.no_grad():
            for weight in (sae.W_dec, sae.b_enc, sae.W_enc.t()):
                weight[dead_mask(n_dead)] = weight[3].clone()
    x = tokens(dtype=torch.float64)
    expected, output = (step(sae, x, dead_mask(n_dead))[0] for sae in (theirs, ours))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_worse_than_saelens(kind):
    theirs, ours = (sae.to(torch.bfloat16) for sae in pair(kind))
    x = tokens(dtype=torch.bfloat16)
    exact, exact_grads = step(in_float64(theirs), x.double(), dead_mask(100))
    expected, expected_grads = step(theirs, x, dead_mask(100))
    output, grads = step(ours, x, dead_mask(100))
    assert relative_error(output.loss, exact.loss) <= relative_error(expected.loss, exact.loss) + 2e-3
    assert relative_error(output.sae_out, exact.sae_out) <= relative_error(expected.sae_out, exact.sae_out) + 4e-3
    assert output.sae_out.dtype == torch.bfloat16
    for name, grad in exact_grads.items():
        assert grads[name].dtype == torch.bfloat16
        assert relative_error(grads[name], grad) <= relative_error(expected_grads[name], grad) + 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_no_worse_than_saelens(kind):
    theirs, ours = pair(kind)
    exact = step(in_float64(theirs), tokens().double(), dead_mask(100))[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected, output = (step(sae, tokens(), dead_mask(100))[0] for sae in (theirs, ours))
    assert (output.loss - exact.loss).abs() <= (expected.loss - exact.loss).abs() + 1e-4 * exact.loss


@pytest.mark.parametrize("n_dead", [None, 20, 600, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_codes(kind, n_dead):
    n, d, n_features = 1024, 8, 8192  # [B, F] is far larger than [F, d] and the buffer of 1M elements, 2M in bfloat16
    cls, config, settings = KINDS[kind]
    if "matryoshka_widths" in settings:
        settings = {**settings, "matryoshka_widths": [512, 2048, n_features]}
    sae = cls(config(d_in=d, d_sae=n_features, **settings))
    mask = dead_mask(n_dead, n_features)
    x = tokens(n, d)
    with Largest() as theirs:
        step(sae, x, mask)
    saelens.accelerate(sae)
    with Largest() as ours:
        step(sae, x, mask)
    assert theirs.size >= n * n_features
    assert ours.size < n * n_features / 2


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_hooks_on_dense_activations_get_them(hook):
    theirs, ours = pair("batchtopk")
    seen = []
    for sae in (theirs, ours):
        sae.add_hook(hook, lambda t, hook: seen.append(t.detach().clone()))
    x = tokens()
    expected, output = (step(sae, x, dead_mask(100))[0] for sae in (theirs, ours))
    assert torch.equal(seen[0], seen[1])
    assert output.feature_acts.layout == torch.strided
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(ours.topk_threshold, theirs.topk_threshold)


def test_hooks_around_the_codes_run_in_the_fast_step():
    theirs, ours = pair("batchtopk")
    for sae in (theirs, ours):
        sae.add_hook("hook_sae_input", lambda t, hook: 1.5 * t)
        sae.add_hook("hook_sae_recons", lambda t, hook: t - 0.25)
    x = tokens()
    (expected, expected_grads), (output, grads) = (step(sae, x, dead_mask(100)) for sae in (theirs, ours))
    assert output.feature_acts.is_sparse
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=0)
    torch.testing.assert_close(grads["b_dec"], expected_grads["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_unusual_normalisation_is_left_to_saelens(norm):
    theirs, ours = pair("batchtopk", normalize_activations=norm)
    expected, output = (step(sae, tokens())[0] for sae in (theirs, ours))
    assert torch.equal(output.loss, expected.loss)
    with pytest.raises(ValueError, match="does not support activation normalization"):
        step(ours, tokens(), dead_mask(5))


def test_encode_is_saelens_own():
    theirs, ours = pair("batchtopk")
    x = tokens().view(5, 10, D)
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert torch.equal(ours(x), theirs(x))


def test_a_batch_that_is_not_two_dimensional():
    theirs, ours = pair("batchtopk")
    x = tokens().view(5, 10, D)
    assert torch.equal(*(sae.training_forward_pass(step_input(x)).loss for sae in (theirs, ours)))


def test_gradients_lie_as_the_weights_do():
    _, ours = pair("batchtopk")
    step(ours, tokens(), dead_mask(100))
    assert ours.W_enc.stride() == (1, D)
    assert ours.W_enc.grad.stride() == ours.W_enc.stride()
    assert ours.W_dec.grad.is_contiguous()


def test_copies_go_on():
    theirs, ours = pair("batchtopk")
    step(ours, tokens(seed=8))
    step(theirs, tokens(seed=8))
    for again in (ours, copy.deepcopy(ours)):
        torch.testing.assert_close(step(again, tokens())[0].loss, step(theirs, tokens())[0].loss, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_row_of_zeros_stays_finite(kind):
    _, ours = pair(kind)
    with torch.no_grad():
        ours.W_dec[::2] = 0
    output, grads = step(ours, tokens(), dead_mask(100))
    assert output.loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_moving_an_sae_drops_what_the_last_batch_left():
    theirs, ours = pair("batchtopk")
    step(ours, tokens())
    step(theirs, tokens())
    theirs, ours = theirs.to(torch.float64), ours.to(torch.float64)
    assert ours.W_enc.stride() == (1, D)
    x = 1e-3 * tokens(dtype=torch.float64)
    torch.testing.assert_close(step(ours, x)[0].loss, step(theirs, x)[0].loss)


def test_compiled_step():
    """`compile_sae` wraps the step in torch.compile, which leaves ours as it is."""
    theirs, ours = pair("batchtopk")
    ours.training_forward_pass = torch.compile(ours.training_forward_pass, backend="aot_eager")
    torch.testing.assert_close(step(ours, tokens())[0].loss, step(theirs, tokens())[0].loss, rtol=2e-5, atol=0)
