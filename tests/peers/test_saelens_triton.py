"""The steps on Triton's kernels, entries in slots of a fixed number: in its interpreter, or on a GPU."""

import pytest
import torch
from saelens_makers import DEVICE, KINDS, dead_mask, in_float64, pair, relative_error, step, tokens

from sampled_sae.impl.interface import implementation
from sampled_sae.integrations.saelens.step import SparseStep

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setattr(SparseStep, "parts", lambda sae: implementation("triton"))


@pytest.mark.parametrize("kind", KINDS)
def test_triton_form(kind):
    theirs, ours = pair(kind, device=DEVICE)
    dead = dead_mask(100).to(DEVICE)
    for number in range(2):
        x = tokens(20, seed=number).to(DEVICE)
        expected, expected_grads = step(theirs, x, dead, number)
        output, grads = step(ours, x, dead, number)
        for name, loss in expected.losses.items():
            torch.testing.assert_close(output.losses[name], loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.feature_acts.to_dense(), expected.feature_acts.detach(), rtol=1e-4, atol=1e-4)
        for name, grad in expected_grads.items():
            assert relative_error(grads[name], grad) <= 1e-4


@torch.no_grad()
def quantise(sae):
    """Parameters that bfloat16 holds, and b_dec such that x - b_dec loses nothing either: no entry at the cut flips."""
    for p in sae.parameters():
        p.copy_(p.bfloat16())
    sae.b_dec.copy_((sae.b_dec * 16).round() / 16)


@pytest.mark.parametrize("n_dead", [30, 100])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka_aux"])
def test_triton_form_in_16_bits_is_no_worse_than_saelens(kind, precision, n_dead):
    """With dead features for dense products, and for entries; the auxiliary loss is float32 all the same."""
    low = torch.bfloat16 if precision == "bfloat16" else torch.float32
    theirs, ours = (sae.to(low) for sae in pair(kind, device=DEVICE))
    for sae in (theirs, ours):
        quantise(sae)
    x, dead = ((tokens(20) * 16).round() / 16).to(DEVICE, low), dead_mask(n_dead).to(DEVICE)
    exact, exact_grads = step(in_float64(theirs), x.double(), dead)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
        expected, expected_grads = step(theirs, x, dead)
        output, grads = step(ours, x, dead)
    assert output.losses["auxiliary_reconstruction_loss"].dtype == torch.float32
    for name, loss in exact.losses.items():
        assert relative_error(output.losses[name], loss) <= relative_error(expected.losses[name], loss) + 2e-3, name
    assert relative_error(output.sae_out, exact.sae_out) <= relative_error(expected.sae_out, exact.sae_out) + 4e-3
    for name, grad in exact_grads.items():
        assert grads[name].dtype == low
        assert relative_error(grads[name], grad) <= relative_error(expected_grads[name], grad) + 1e-2, name
