"""A crosscoder as a module: shapes and scales in and out, evaluation, settings, files, what it says of itself."""

import json
from dataclasses import replace

import pytest
import torch
from crosscoder_makers import RULES, D, L, batch, make, scaled
from makers import same_weights, tokens

from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae.impl.given_tokens import flat_tokens, given_back
from sampled_sae.integrations.saebench import SAEBenchSAE
from sampled_sae.model_card import RunFacts, model_card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_factors_of_layers_are_not_rounded_themselves(dtype):
    sae, x = make(dtype, input_scale=(0.3, 7.1, 1.0)), batch(50, dtype=dtype)
    inside = flat_tokens(sae, x, scaled=False)
    assert torch.equal(inside.view(x.shape), torch.stack([x[:, i] * s for i, s in enumerate((0.3, 7.1, 1.0))], 1))
    back = given_back(sae.cfg, inside, x, scaled=False)
    torch.testing.assert_close(back, x, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_evaluation_mode():
    sae, x = make(**RULES[2]), batch(50)
    sae.calibrate(x, 4)
    sae.eval()
    a = torch.relu(scaled(sae, x) @ sae.W_enc + sae.b_enc)
    kept = torch.where(a > sae.threshold, a, 0)
    torch.testing.assert_close(sae.encode(x), kept)
    assert float((kept > 0).sum()) == 200
    expected = (kept @ sae.W_dec + sae.b_dec).view(-1, L, D)
    out, by_layer = sae(x), torch.tensor(sae.cfg.input_scale).double()[:, None]
    torch.testing.assert_close(out.x_hat, expected / by_layer)
    torch.testing.assert_close(out.loss, (expected - x * by_layer).square().sum((1, 2)).mean())
    torch.testing.assert_close(sae(x * by_layer, scaled=True).x_hat, expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), scaled=True), expected)


def test_layers_side_by_side_or_one_behind_the_other():
    sae, x = make(), batch(2, 5)
    sae.calibrate(x, 4)
    sae.eval()
    side, behind = sae(x), sae(x.flatten(-2))
    assert side.x_hat.shape == (2, 5, L, D)
    assert behind.x_hat.shape == (2, 5, L * D)
    assert torch.equal(side.x_hat.flatten(-2), behind.x_hat)
    for given_x in (x, x.flatten(-2)):
        assert sae.encode(given_x).shape == (2, 5, 96)
        assert sae.decode(sae.encode(given_x)).shape == x.shape
    square = make(d_in=L)  # [L, d] with L = d, which flat activations [B, L * d] cannot be taken for
    assert square(tokens(7, L, L)).x_hat.shape == (7, L, L)


@pytest.mark.parametrize(
    ("shape", "error"),
    [((5, 2, 4), ValueError), ((5, 4, 3), ValueError), ((5, 4), ValueError), ((5, 11), ValueError), ((4,), ValueError)],
    ids=str,
)
def test_other_shapes_are_refused(shape, error):
    with pytest.raises(error, match=r"x\.shape=.*\[layers=3, d_in=4\], or one of 12"):
        make()(tokens(*shape))
    with pytest.raises(TypeError, match="x=list"):
        make()([[1.0] * 12])


def test_where_a_training_starts():
    sae = SampledSAE(SampledSAEConfig(d_in=D, d_sae=96, k=4, layers=L))
    torch.testing.assert_close(sae.layer_norms().sum(1), torch.ones(96))
    # an activation decodes to what it was read from, as in an SAE with W_enc = W_dec^T
    torch.testing.assert_close((sae.W_enc.t() * sae.W_dec).sum(1), torch.ones(96))
    direction = [torch.nn.functional.normalize(rows, dim=1) for rows in (sae.W_enc.t(), sae.W_dec)]
    torch.testing.assert_close(*direction)
    x = batch(60, dtype=torch.float32) + torch.arange(L, dtype=torch.float32)[:, None]
    sae.init_b_dec(x)
    pull = torch.nn.functional.normalize(x.flatten(1) - sae.b_dec, dim=1).sum(0)
    assert pull.norm() < 1e-2


def test_saved_and_loaded(tmp_path):
    sae = make(**RULES[2])
    sae.calibrate(batch(50), 4)
    sae.save_pretrained(tmp_path)
    again = SampledSAE.from_pretrained(tmp_path)
    assert again.cfg == sae.cfg
    assert again.cfg.input_scale == (0.5, 2.0, 1.0)
    assert same_weights(sae, again)
    fields = json.loads((tmp_path / "config.json").read_text())["sae"]
    assert (fields["layers"], fields["d_in"], fields["input_scale"]) == (L, D, [0.5, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"input_scale=1\.0: the state dict is of an SAE with input_scale=\(0\.5, 2"):
        make().load_state_dict(sae.state_dict())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layers": 0}, ValueError, "layers=0"),
        ({"layers": 2.5}, TypeError, "layers=2.5"),
        ({"layers": "2"}, TypeError, "layers='2'"),
        ({"d_out": 7}, ValueError, "layers=3: a transcoder reads one; d_out=7"),
        ({"skip": True}, ValueError, "layers=3: a transcoder reads one"),
        ({"output_scale": 2.0}, ValueError, "output_scale=2.0: must be 1 for an SAE"),
        ({"input_scale": (1.0, 2.0)}, ValueError, r"input_scale=\(1.0, 2.0\): must be .* a sequence of 3, one a layer"),
        ({"input_scale": (1.0, 2.0, 0.0)}, ValueError, "input_scale=.*a sequence of 3"),
        ({"input_scale": (1.0, 2.0, "3")}, TypeError, "input_scale=.*a sequence of 3"),
        ({"input_scale": "1.0"}, TypeError, "input_scale=.*a sequence of 3"),
        ({"layers": 1, "input_scale": (1.0,)}, TypeError, r"input_scale=\(1.0,\): must be a finite number"),
    ],
    ids=str,
)
def test_bad_settings_are_named(changes, error, said):
    with pytest.raises(error, match=said):
        SampledSAEConfig(**{"d_in": D, "d_sae": 96, "k": 4, "layers": L, **changes})


def test_defaults_of_a_config():
    cfg = SampledSAEConfig(d_in=D, d_sae=96, k=4, layers=L)
    assert (cfg.width_in, cfg.width_out, cfg.aux_features) == (L * D, L * D, D // 2)
    assert SampledSAEConfig(d_in=D, d_sae=96, k=4).apply_b_dec_to_input is True
    assert replace(cfg, input_scale=torch.tensor([1.0, 2.0, 3.0])).input_scale == (1.0, 2.0, 3.0)
    assert SampledSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_another_number_of_layers_for_the_same_weights_is_refused():
    sae = make()
    with pytest.raises(ValueError, match="layers=6: the weights are of layers=3"):
        sae.cfg = replace(sae.cfg, layers=6)


def test_the_norms_say_where_a_feature_lives():
    sae = make()
    with torch.no_grad():
        sae.W_dec[0] = 0
        sae.W_dec[0, D] = -1.0  # in the second layer alone
        sae.W_dec[1] = torch.tensor([1 / L / D**0.5]).double()  # in all alike
    torch.testing.assert_close(sae.layer_norms()[:2], torch.tensor([[0.0, 1.0, 0.0], [1 / 3] * 3]).double())


def test_what_takes_no_crosscoder_says_so():
    with pytest.raises(ValueError, match="layers=3: SAEBench has no place"):
        SAEBenchSAE(make(), model_name="pythia-70m", hook_layer=1)
    with pytest.raises(ValueError, match="a crosscoder reconstructs, with its layer, other activations"):
        make().eval().splice(torch.nn.Identity(), 0).__enter__()


def test_the_card_says_how_a_crosscoder_is_used():
    card = model_card("me/mine", SampledSAEConfig(d_in=D, d_sae=96, k=4, layers=L), RunFacts())
    assert "A crosscoder with 96 features on 3 layers of width 4 side by side" in card
    assert "x: [tokens, 3, 4]" in card
