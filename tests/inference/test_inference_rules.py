"""Each rule and convention of inference against its formula, in float64, by `impl="reference"` and "torch"."""

import pytest
import torch
from inference_makers import make, settings_of

from sampled_sae.inference.config import RULES

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
IMPLS = ("reference", "torch")


def expected_codes(t, x, rule, k, scale=1):
    """What a rule lets through of x, normed and centred, written down once more."""
    z = x @ t["W_enc"]
    if rule == "gated":
        return torch.where(z + t["b_gate"] > 0, torch.relu(z * t["r_mag"].exp() + t["b_mag"]) * scale, 0)
    a = torch.relu(z + t["b_enc"]) * scale
    if rule == "topk":
        kept = a.topk(k, dim=1)
        return torch.zeros_like(a).scatter(1, kept.indices, kept.values)
    return torch.where(a > t["threshold"], a, 0) if "threshold" in t else a


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_a_plain_sae(rule, impl):
    sae, x = make(rule, impl=impl)
    t = dict(sae.named_buffers())
    expected = expected_codes(t, x, rule, sae.cfg.k)
    out = sae(x)
    torch.testing.assert_close(out.codes.to_dense(), expected, **TOLERANCE)
    torch.testing.assert_close(out.x_hat, expected @ t["W_dec"] + t["b_dec"], **TOLERANCE)
    assert 0 < out.codes.count() < expected.numel()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_every_convention_at_once(rule, impl):
    """b_dec at the input, decoder norms, a layer norm that is undone, a factor."""
    settings = {"apply_b_dec_to_input": True, "scale_by_decoder_norm": True, "normalize": "layer_norm"}
    sae, x = make(rule, impl=impl, input_scale=0.5, **settings)
    t = dict(sae.named_buffers())
    mean, std = (0.5 * x).mean(1, keepdim=True), (0.5 * x).std(1, keepdim=True)
    norms = t["W_dec"].norm(dim=1)
    expected = expected_codes(t, (0.5 * x - mean) / (std + 1e-5) - t["b_dec"], rule, sae.cfg.k, norms)
    torch.testing.assert_close(sae.encode(x), expected, **TOLERANCE)
    x_hat = ((expected / norms) @ t["W_dec"] + t["b_dec"]) * std + mean
    torch.testing.assert_close(sae(x).x_hat, x_hat / 0.5, **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_a_transcoder_with_a_skip(rule, impl):
    """Its reconstruction has a width and a factor of its own; the norm of its input is not undone."""
    sae, x = make(rule, impl=impl, d_out=7, skip=True, normalize="constant_norm", input_scale=2.0, output_scale=4.0)
    t = dict(sae.named_buffers())
    normed = 2 * x * (sae.cfg.d_in**0.5 / (2 * x).norm(dim=1, keepdim=True))
    expected = expected_codes(t, normed, rule, sae.cfg.k)
    out = sae(x)
    torch.testing.assert_close(out.codes.to_dense(), expected, **TOLERANCE)
    x_hat = (expected @ t["W_dec"] + t["b_dec"] + 2 * x @ t["W_skip"].t()) / 4
    torch.testing.assert_close(out.x_hat, x_hat, **TOLERANCE)
    torch.testing.assert_close(sae.decode(out.codes), (expected @ t["W_dec"] + t["b_dec"]) / 4, **TOLERANCE)


def test_the_settings_serve_every_rule():
    assert {rule: settings_of(rule).get("k") for rule in RULES} == {**dict.fromkeys(RULES), "topk": 4}
