"""`input_scale`: the factor on the activations belongs to the SAE, wherever it is trained, saved, read and measured."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from makers import begun_training, gradients, make_sae, tokens, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import ActivationStore, SAEGroup, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.impl.given_tokens import flat_tokens
from sampled_sae.training.checkpoint import CHECKPOINT
from sampled_sae.training.evaluation import evaluate_activations, reconstruct_with

RULES = [{"l": 3.0}, {"l": None}, {"l": None, "select": "token"}, {"l": 2.0, "apply_b_dec_to_input": False}]
SCALES = [0.05, 0.37, 8.0]


def pair(scale, dtype=torch.float32, **rule):
    """Two equal SAEs of this input_scale, calibrated."""
    sae = make_sae(dtype, input_scale=scale, **rule)
    sae.calibrate(tokens(200, 12, dtype=dtype, seed=7), scaled=True)
    return sae, copy.deepcopy(sae)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_raw_and_scaled_activations_give_the_same(impl, rule, scale, training):
    raw, scaled = pair(scale, impl=impl, **rule)
    x = (tokens(2, 15, 12, dtype=torch.float32) / scale).requires_grad_()
    x_scaled = (x.detach() * scale).requires_grad_()
    ours, theirs = raw.train(training)(x), scaled.train(training)(x_scaled, scaled=True)
    assert 0 < ours.codes.count() < 30 * 48
    assert torch.equal(ours.codes.to_dense(), theirs.codes.to_dense())
    assert torch.equal(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.x_hat, theirs.x_hat / scale)
    (ours.loss + ours.x_hat.sum()).backward()
    (theirs.loss + (theirs.x_hat / scale).sum()).backward()
    for name, gradient in gradients(raw).items():
        torch.testing.assert_close(gradient, gradients(scaled)[name])
    torch.testing.assert_close(x.grad, x_scaled.grad * scale)
    for name, value in raw.state_dict().items():
        assert torch.equal(value, scaled.state_dict()[name])
    with torch.no_grad():
        codes = raw.encode_sparse(x)
        assert torch.equal(raw.encode(x), scaled.encode(x_scaled, scaled=True))
        assert torch.equal(
            raw.encode_above_threshold(x).to_dense(), scaled.encode_above_threshold(x_scaled, scaled=True).to_dense()
        )
        for form in (codes, codes.to_dense()):
            torch.testing.assert_close(raw.decode(form), raw.decode(form, scaled=True) / scale)
        assert raw.calibrate(x, 3) == scaled.calibrate(x_scaled, 3, scaled=True)
        raw.init_b_dec(x)
        scaled.init_b_dec(x_scaled, scaled=True)
    assert torch.equal(raw.b_dec, scaled.b_dec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_reconstruction_has_the_units_of_the_activations(dtype):
    """What an SAE of scale 1 makes of x / s is s times as large as what one of scale s makes of x / s."""
    plain, (sae, _) = make_sae(dtype), pair(0.25, dtype)
    x = tokens(30, 12, dtype=dtype)
    ours, theirs = sae(4 * x), plain(x)
    assert torch.equal(ours.codes.to_dense(), theirs.codes.to_dense())
    assert torch.equal(ours.x_hat, 4 * theirs.x_hat)
    assert ours.x_hat.dtype == dtype


def test_a_compiled_layer_scales_too():
    raw, scaled = pair(0.37)
    compiled = torch.compile(raw, backend="aot_eager")
    x = tokens(30, 12, dtype=torch.float32)
    for _ in range(2):
        out = compiled(x / 0.37)
        expected = scaled((x / 0.37) * 0.37, scaled=True)
        assert torch.equal(out.codes.to_dense(), expected.codes.to_dense())
        torch.testing.assert_close(out.x_hat, expected.x_hat / 0.37)


def test_nan_in_raw_activations_is_found_and_nothing_is_computed_for_a_scale_of_1():
    sae, x = make_sae(input_scale=0.5), tokens(3, 12)
    x[1, 7] = torch.nan
    with pytest.raises(ValueError, match=r"x: 1 of 36 values are NaN or inf, the first at \(1, 7\)"):
        sae(x)
    x = tokens(3, 12)
    assert flat_tokens(sae, x, scaled=True).data_ptr() == x.data_ptr()
    assert flat_tokens(make_sae(), x, scaled=False).data_ptr() == x.data_ptr()


SAE = SampledSAEConfig(d_in=12, d_sae=48, k=3, l=4.0, dead_after=300)
TRAIN = TrainConfig(steps=30, batch_size=50, lr=1e-2, log_every=10, checkpoint_every=10)


@pytest.fixture
def store(tmp_path):
    """Activations ten times as large as an SAE wants them."""
    return ActivationStore.open(write_store(tmp_path / "activations", scale=0.1))


def test_training_writes_the_stores_scale_into_the_sae(store, tmp_path):
    sae = Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    again = Trainer(replace(SAE, input_scale=0.1), TRAIN, store, tmp_path / "again").run(progress=False)
    members = SAEGroup({"a": SAE, "b": replace(SAE, l=None)}, TRAIN, store, tmp_path / "group").run(progress=False)
    x = store.holdout()[0]
    for found in (sae, again, members["a"], SampledSAE.from_pretrained(tmp_path / "run")):
        assert found.cfg.input_scale == 0.1
        assert torch.equal(found.encode(x), sae.encode(x))
    assert sae.encode_sparse(store.first(500)).l0() == pytest.approx(3, rel=0.3)
    for words, config in (
        ("input_scale=2.0: the training multiplies .* by 0.1", replace(SAE, input_scale=2.0)),
        ("configs.'b'.: input_scale=0.2", replace(SAE, input_scale=0.2)),
    ):
        with pytest.raises(ValueError, match=words):
            SAEGroup({"b": config}, TRAIN, store, tmp_path / "other")


def test_the_same_vectors_in_two_stores_give_the_same_metrics(store, tmp_path):
    sae = Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    found = [evaluate_activations(sae, store.holdout()[0], 64)]
    for i, scale in enumerate((1.0, 0.37)):
        other = write_store(tmp_path / f"other{i}", scale=scale)
        assert main(["evaluate", str(tmp_path / "run"), str(other), "--splice-rows", "0", "--batch-size", "64"]) == 0
        found.append(json.loads((tmp_path / "run" / "evaluation.json").read_text()))
    assert found[0]["l0"] == pytest.approx(3, rel=0.5)
    assert found[0] == found[1] == found[2]


def without_scale(folder):
    """The folder as an earlier version wrote it."""
    config = json.loads((folder / "config.json").read_text())
    del config["sae"]["input_scale"], config["crc32"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "sae.safetensors")
    del tensors["calibrated_at"]
    save_file(tensors, folder / "sae.safetensors")


@pytest.mark.parametrize(
    ("file", "text", "scale"),
    [
        ("run.json", {"activations": {"scale": 0.125}}, 0.125),
        ("origin.json", {"model_name": "m", "scale": 3.0}, 3.0),
        ("run.json", {"activations": {}}, 1.0),
        ("origin.json", {}, 1.0),
        ("other.json", {"scale": 3.0}, 1.0),
    ],
)
def test_an_sae_of_an_earlier_version_has_the_scale_that_stands_beside_it(tmp_path, file, text, scale):
    sae, _ = pair(1.0)
    sae.save_pretrained(tmp_path)
    without_scale(tmp_path)
    (tmp_path / file).write_text(json.dumps(text))
    loaded = SampledSAE.from_pretrained(tmp_path)
    assert loaded.cfg == replace(sae.cfg, input_scale=scale)
    x = tokens(20, 12, dtype=torch.float32)
    assert torch.equal(loaded.encode(x / scale), loaded.encode(x / scale * scale, scaled=True))
    loaded.save_pretrained(tmp_path / "new")
    assert SampledSAE.from_pretrained(tmp_path / "new").cfg.input_scale == scale


def test_a_checkpoint_of_an_earlier_version_goes_on(store, tmp_path):
    whole = Trainer(SAE, TRAIN, store, tmp_path / "whole").run(progress=False)
    begun_training(SAE, TRAIN, store, tmp_path / "begun", steps=10)
    state = torch.load(tmp_path / "begun" / CHECKPOINT, weights_only=True)
    del state["settings"]["sae"]["input_scale"], state["sae"]["calibrated_at"]
    torch.save(state, tmp_path / "begun" / CHECKPOINT)
    resumed = Trainer(SAE, TRAIN, store, tmp_path / "begun")
    assert resumed.step == 10
    resumed.run(progress=False)
    for name in ("config.json", "sae.safetensors"):
        assert (tmp_path / "begun" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.cfg.input_scale == 0.1


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2", True, None])
def test_what_a_scale_may_be(value):
    with pytest.raises((ValueError, TypeError), match=f"input_scale={value!r}: must be "):
        SampledSAEConfig(d_in=3, d_sae=4, k=1, input_scale=value)


def test_a_reconstruction_for_a_language_model_takes_what_the_model_makes():
    sae, _ = pair(0.1)
    x = 10 * tokens(40, 12, dtype=torch.float32)
    sae.eval()
    torch.testing.assert_close(reconstruct_with(sae)(x), sae(x).x_hat)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    assert reconstruct_with(half)(x).dtype == torch.float32
