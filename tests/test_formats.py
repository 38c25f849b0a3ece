"""Conversions to the peers' files and back, without the peers: round trips, and what the files mean."""

import json
from dataclasses import replace

import pytest
import torch
from format_makers import (
    DTYPES,
    FILES,
    OURS,
    RULES,
    changed_config,
    config_of,
    rule_for,
    same_files,
    same_tensors,
    tensors_of,
    trained,
    without_extra,
)
from makers import make_sae, tokens
from safetensors.torch import load_file, save_file

from sampled_sae import formats


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ours_to_theirs_to_ours_gives_the_same_files(tmp_path, to, dtype, rule):
    sae = trained(dtype, **RULES[rule])
    sae.save_pretrained(tmp_path / "ours")
    for i, scale in enumerate((1.0, 0.25, 0.37)):
        folder = tmp_path / f"theirs{i}"
        written = formats.export(sae, folder, to=to, scale=scale, **rule_for(to))
        assert sorted(written) == sorted(folder.iterdir())
        formats.load(folder).save_pretrained(tmp_path / f"back{i}")
        assert same_files(tmp_path / "ours", tmp_path / f"back{i}", OURS)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_an_input_that_is_not_centred_comes_back_too(tmp_path, to):
    sae = trained(apply_b_dec_to_input=False, k=4.0)
    sae.save_pretrained(tmp_path / "ours")
    said = []
    formats.export(sae, tmp_path / "theirs", to=to, scale=0.3, say=said.append, **rule_for(to))
    assert any("b_dec W_enc is added to b_enc" in line for line in said) == (to != "saelens")
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_theirs_to_ours_to_theirs_keeps_the_tensors(tmp_path, to, dtype, rule):
    origin = formats.Origin("org/model", layer=5, context_size=128)
    formats.export(trained(dtype, **RULES[rule]), tmp_path / "theirs", to=to, origin=origin, **rule_for(to))
    loaded = formats.read(without_extra(tmp_path / "theirs"))
    formats.export(loaded.sae, tmp_path / "again", to=to, origin=loaded.origin, scale=loaded.scale)
    assert same_tensors(*(tensors_of(tmp_path / name, to) for name in ("theirs", "again")))
    first, second = (config_of(tmp_path / name, to) for name in ("theirs", "again"))
    assert second == first


@pytest.mark.parametrize("to", formats.FORMATS)
def test_what_an_export_was_told_comes_back(tmp_path, to):
    """Also where the peer's own files have no place for it."""
    origin = formats.Origin("org/model", 5, "blocks.5.hook_resid_pre", 128)
    formats.export(trained(), tmp_path, to=to, scale=0.25, origin=origin, **rule_for(to))
    assert formats.read(tmp_path)[1:] == (origin, 0.25)
    assert formats.read(tmp_path, scale=2.0).scale == 2
    alone = formats.read(without_extra(tmp_path))
    assert alone[1:] == (formats.Origin() if to == "sparsify" else origin, 1)


# of an SAE whose files say nothing of its training
DEFAULTS = {"l": None, "select": "token", "score": "l2", "aux_coefficient": 1 / 32, "aux_pool": 1024}
DEFAULTS |= {"threshold_decay": 0.999, "dead_after": 10_000_000}


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["l=4, entropy", "topk"])
def test_the_peers_files_alone_carry_weights_rule_and_threshold(tmp_path, to, dtype, rule):
    """A scale that is a power of two loses no bit."""
    sae = trained(dtype, **RULES[rule])
    formats.export(sae, tmp_path, to=to, scale=0.5, **rule_for(to))
    loaded = formats.load(without_extra(tmp_path), scale=0.5)
    topk = rule == "topk" or to == "sparsify"
    if to == "sparsify":
        assert loaded.cfg == replace(sae.cfg, **DEFAULTS)
    else:
        assert loaded.cfg == sae.cfg
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(loaded, name), getattr(sae, name))
    assert loaded.W_enc.stride() == sae.W_enc.stride()
    if topk and to != "dictionary_learning":
        assert (float(loaded.threshold), int(loaded.threshold_steps)) == (0, 0)
    else:
        # dictionary_learning's threshold is read back into float32 even for float64 weights only where it fits
        assert torch.equal(loaded.threshold, sae.threshold)
        assert int(loaded.threshold_steps) == 1
    assert int(loaded.tokens_since_active.max()) == 0


@pytest.mark.parametrize("to", formats.FORMATS)
def test_any_scale_is_undone_to_an_ulp(tmp_path, to):
    sae = trained()
    formats.export(sae, tmp_path, to=to, scale=0.37, **rule_for(to))
    loaded = formats.load(without_extra(tmp_path), scale=0.37)
    for name in ("b_enc", "b_dec"):
        ours, theirs = getattr(sae, name).detach(), getattr(loaded, name).detach()
        ulp = torch.nextafter(ours.abs(), torch.tensor(torch.inf)) - ours.abs()
        assert ((ours - theirs).abs() <= ulp).all()
    assert torch.equal(loaded.W_enc, sae.W_enc)


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("centred", [True, False])
def test_a_given_scale_takes_the_place_of_the_exported_one(tmp_path, to, centred):
    """What was trained stays; biases and threshold, also those that the peer's files lack, are in the new units."""
    sae = trained(l=2.0, score="entropy", select="token", dead_after=30, apply_b_dec_to_input=centred)
    formats.export(sae, tmp_path, to=to, scale=0.25, **rule_for(to))
    for scale in (1, 0.5, None):
        loaded = formats.load(tmp_path, scale=scale)
        assert loaded.cfg == sae.cfg
        factor = 1 if scale is None else scale / 0.25
        for name, value in sae.state_dict().items():
            expected = value * factor if name in ("b_enc", "b_dec", "threshold") else value
            assert torch.equal(loaded.state_dict()[name], expected), name


def encoder_of(folder, to):
    """(W_enc, b_enc, W_dec, b_dec, threshold, k) of a peer's folder, float64, as the peer would multiply them."""
    t, config = tensors_of(folder, to), json.loads((folder / FILES[to][1]).read_text())
    if to == "saelens":
        named = (t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], t.get("threshold"), config.get("k"))
    elif to == "dictionary_learning":
        k = config["trainer"]["k"]
        named = (t["encoder.weight"].T, t["encoder.bias"], t["decoder.weight"].T, t["b_dec"], t["threshold"], k)
    else:
        named = (t["encoder.weight"].T, t["encoder.bias"], t["W_dec"], t["b_dec"], None, config["k"])
    return [v.double() if isinstance(v, torch.Tensor) else v for v in named]


PEER_RULES = [*((to, "topk") for to in formats.FORMATS), ("saelens", "threshold"), ("dictionary_learning", "threshold")]


@pytest.mark.parametrize(("to", "inference"), PEER_RULES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_the_files_mean_what_the_sae_computes(tmp_path, to, centred, inference, scale):
    sae = trained(torch.float64, l=None, select="token", apply_b_dec_to_input=centred)
    formats.export(sae, tmp_path, to=to, inference=inference, scale=scale)
    W_enc, b_enc, W_dec, b_dec, threshold, k = encoder_of(tmp_path, to)
    x = tokens(31, 12, seed=5)
    a = torch.relu((x / scale - (b_dec if centred or to != "saelens" else 0)) @ W_enc + b_enc)
    if inference == "threshold":
        codes = a * (a > threshold)
    else:
        codes = torch.zeros_like(a).scatter(1, a.topk(k).indices, a.topk(k).values)
    sae.train(inference == "topk")
    expected = sae.encode(x)
    assert 0 < (expected > 0).sum() < expected.numel() / 4
    assert torch.equal(codes > 0, expected > 0)
    torch.testing.assert_close(codes * scale, expected)
    torch.testing.assert_close((codes @ W_dec + b_dec) * scale, sae.decode(expected))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: changed_config(f, "cfg.json", lambda c: c.update(k=9)),
        lambda f: changed_config(f, "cfg.json", lambda c: c.update(apply_b_dec_to_input=False)),
        lambda f: save_file({n: -t for n, t in tensors_of(f, "saelens").items()}, f / "sae_weights.safetensors"),
    ],
)
def test_files_that_have_changed_since_the_export_count_alone(tmp_path, change):
    said = []
    formats.export(trained(dead_after=9, l=None, select="token"), tmp_path, to="saelens")
    assert formats.load(tmp_path, say=said.append).cfg.dead_after == 9
    assert said == ["configuration and training state are those that were exported"]
    change(tmp_path)
    loaded = formats.load(tmp_path, say=said.append)
    assert "sampled_sae.safetensors is of other weights" in said[1]
    assert not loaded.tokens_since_active.any()
    assert torch.equal(loaded.W_dec, tensors_of(tmp_path, "saelens")["W_dec"])


def test_k_is_whole_where_it_must_be(tmp_path):
    sae = trained(k=2.5)
    formats.export(sae, tmp_path / "jumprelu", to="saelens")
    assert formats.load(without_extra(tmp_path / "jumprelu")).cfg.k == 2.5
    assert formats.load(tmp_path / "jumprelu", k=3).cfg.k == 3
    for to in ("dictionary_learning", "sparsify", "saelens"):
        for k, shown in ((None, "2.5"), (97, "97"), (0, "0")):
            with pytest.raises(ValueError, match=rf"k={shown}: .*whole numbers in \[1, 96\] only; choose one with"):
                formats.export(sae, tmp_path / to, to=to, inference="topk", k=k)
        assert not (tmp_path / to).exists()
        formats.export(sae, tmp_path / to, to=to, inference="topk", k=3)
        assert formats.load(tmp_path / to).cfg == sae.cfg
        assert formats.load(without_extra(tmp_path / to)).cfg.k == 3


def test_another_k_is_said_where_the_threshold_was_set_for_the_old_one(tmp_path):
    formats.export(trained(), tmp_path, to="saelens")
    for prepare in (lambda f: f, without_extra):
        said = []
        loaded = formats.load(prepare(tmp_path), k=5.0, say=said.append)
        assert repr(loaded.cfg.k) == "5"
        assert said[-1] == "k=5.0 in place of 4: the threshold stays as it is; calibrate(x) sets it for this k"
        formats.load(tmp_path, k=4, say=said.append)
        assert "in place of" not in said[-1]


def test_what_inference_auto_chooses():
    choices = {name: formats.inference_rule(trained(**rule).cfg, "auto") for name, rule in RULES.items()}
    assert choices == {name: "topk" if name == "topk" else "threshold" for name in RULES}


@pytest.mark.parametrize("unset", [0.0, -1.0])
def test_a_threshold_that_was_never_set(tmp_path, unset):
    """-1 is what dictionary_learning's trainers start with."""
    sae, said = make_sae(torch.float32), []
    sae.threshold.fill_(unset)
    formats.export(sae, tmp_path / "d", to="dictionary_learning", say=said.append)
    assert "the threshold was never set" in said[0]
    assert float(tensors_of(tmp_path / "d", "dictionary_learning")["threshold"]) == -1
    formats.export(sae, tmp_path / "s", to="saelens")
    assert not tensors_of(tmp_path / "s", "saelens")["threshold"].any()
    assert float(formats.load(tmp_path / "s").threshold) == unset
    loaded = formats.load(without_extra(tmp_path / "d"), say=said.append)
    assert (float(loaded.threshold), int(loaded.threshold_steps)) == (0, 0)
    assert "call calibrate(x)" in said[-1]


def test_a_threshold_below_zero_is_zero_in_their_files(tmp_path):
    sae = trained()
    sae.threshold.fill_(-0.5)
    for to in ("saelens", "dictionary_learning"):
        formats.export(sae, tmp_path / to, to=to)
        assert not tensors_of(tmp_path / to, to)["threshold"].any()


def test_a_threshold_for_each_feature(tmp_path):
    sae, said = trained(torch.float64), []
    formats.export(sae, tmp_path, to="saelens")
    file = without_extra(tmp_path) / "sae_weights.safetensors"
    t = load_file(file)
    own = torch.linspace(0.5, 2, 96, dtype=torch.float64) * t["threshold"]
    save_file({**t, "threshold": own}, file)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: threshold of each feature.*--rescale-features"):
        formats.load(tmp_path)
    loaded = formats.load(tmp_path, rescale_features=True, say=said.append).eval()
    assert any("features are rescaled" in line for line in said)
    x = tokens(40, 12, seed=4)
    a = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    codes = a * (a > own)
    assert torch.equal(loaded.encode(x) > 0, codes > 0)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), codes @ t["W_dec"] + t["b_dec"])
    torch.testing.assert_close(loaded.encode(x), codes * (loaded.threshold / own))
    save_file({**t, "threshold": own - own[0]}, file)
    with pytest.raises(ValueError, match="1 of 96 are not positive"):
        formats.load(tmp_path, rescale_features=True)


def test_thresholds_equal_up_to_rounding_are_one(tmp_path):
    sae, said = trained(), []
    formats.export(sae, tmp_path, to="saelens")
    file = without_extra(tmp_path) / "sae_weights.safetensors"
    t = load_file(file)
    t["threshold"][::2] *= 1 + 1e-7
    assert len(t["threshold"].unique()) == 2
    save_file(t, file)
    loaded = formats.load(tmp_path, say=said.append)
    assert float(loaded.threshold) in t["threshold"].tolist()
    assert "equal up to rounding" in said[0]
    t["threshold"][::2] *= 1 + 1e-5
    save_file(t, file)
    with pytest.raises(ValueError, match="threshold of each feature"):
        formats.load(tmp_path)


def test_a_16_bit_threshold_stays_exact_in_the_file(tmp_path):
    sae, said = trained(torch.bfloat16), []
    sae.threshold.fill_(1 + 2**-20)
    formats.export(sae, tmp_path / "exact", to="saelens", say=said.append)
    assert tensors_of(tmp_path / "exact", "saelens")["threshold"].dtype == torch.float32
    assert "SAELens rounds the threshold to bfloat16" in said[0]
    sae.threshold.fill_(1.5)
    formats.export(sae, tmp_path / "short", to="saelens", say=said.append)
    assert tensors_of(tmp_path / "short", "saelens")["threshold"].dtype == torch.bfloat16
    assert len(said) == 1


def test_what_is_read_is_recorded(tmp_path):
    sae = trained()
    origin = formats.Origin("org/model", layer=5, context_size=128)
    formats.export(sae, tmp_path / "s", to="saelens", origin=origin)
    metadata = json.loads((tmp_path / "s/cfg.json").read_text())["metadata"]
    assert metadata["sae_lens_version"] == "6.54.12"
    assert metadata["training_architecture_details"] == sae.cfg.to_dict()
    expected = {"model_name": "org/model", "hook_name": "blocks.5.hook_resid_post", "hook_layer": 5}
    assert expected.items() <= metadata.items()
    formats.export(sae, tmp_path / "d", to="dictionary_learning", origin=formats.Origin("m", 2, hook_name="here"))
    trainer = json.loads((tmp_path / "d/config.json").read_text())["trainer"]
    assert {"lm_name": "m", "layer": 2, "submodule_name": "here", "activation_dim": 12}.items() <= trainer.items()
    assert (trainer["trainer_class"], trainer["dict_class"]) == ("BatchTopKTrainer", "BatchTopKSAE")


def test_two_exports_give_the_same_bytes(tmp_path):
    for to in formats.FORMATS:
        for name in ("a", "b"):
            formats.export(trained(), tmp_path / to / name, to=to, **rule_for(to))
        names = [*FILES[to], "sampled_sae.safetensors"]
        assert same_files(tmp_path / to / "a", tmp_path / to / "b", names)
