"""Conversions to the peers' files and back, without the peers: round trips, what the files mean, the two commands."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from format_makers import (
    DTYPES,
    FILES,
    OURS,
    RULES,
    config_of,
    rule_for,
    same_files,
    same_tensors,
    tensors_of,
    trained,
    without_extra,
)
from makers import tokens, write_store

from sampled_sae import SampledSAE, formats
from sampled_sae.cli import main


@pytest.mark.one_in(7)
@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ours_to_theirs_to_ours_gives_the_same_files(tmp_path, to, dtype, rule):
    sae = trained(dtype, **RULES[rule])
    for i, scale in enumerate((1.0, 0.25, 0.37)):
        sae.cfg = replace(sae.cfg, input_scale=scale)
        sae.save_pretrained(tmp_path / "ours")
        folder = tmp_path / f"theirs{i}"
        written = formats.export(sae, folder, to=to, **rule_for(to))
        assert sorted(written) == sorted(folder.iterdir())
        formats.load(folder).save_pretrained(tmp_path / f"back{i}")
        assert same_files(tmp_path / "ours", tmp_path / f"back{i}", OURS)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_an_input_that_is_not_centred_comes_back_too(tmp_path, to):
    sae = trained(apply_b_dec_to_input=False, k=4.0, input_scale=0.3)
    sae.save_pretrained(tmp_path / "ours")
    said = []
    formats.export(sae, tmp_path / "theirs", to=to, say=said.append, **rule_for(to))
    assert any("b_dec W_enc is added to b_enc" in line for line in said) == (to != "saelens")
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_theirs_to_ours_to_theirs_keeps_the_tensors(tmp_path, to, dtype, rule):
    origin = formats.Origin("org/model", layer=5, context_size=128)
    formats.export(trained(dtype, **RULES[rule]), tmp_path / "theirs", to=to, origin=origin, **rule_for(to))
    loaded = formats.read(without_extra(tmp_path / "theirs"))
    formats.export(loaded.sae, tmp_path / "again", to=to, origin=loaded.origin)
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
        assert loaded.cfg == replace(sae.cfg, input_scale=0.5, **DEFAULTS)
    else:
        assert loaded.cfg == replace(sae.cfg, input_scale=0.5)
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
        assert loaded.cfg == replace(sae.cfg, input_scale=0.25 if scale is None else scale)
        factor = 1 if scale is None else scale / 0.25
        given = {"input_scale": torch.tensor(loaded.cfg.input_scale, dtype=torch.float64)}
        for name, value in (sae.state_dict() | given).items():
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
    expected = sae.encode_above_threshold(x).to_dense() if inference == "threshold" else sae.eval().encode(x)
    assert 0 < (expected > 0).sum() < expected.numel() / 4
    assert torch.equal(codes > 0, expected > 0)
    torch.testing.assert_close(codes * scale, expected)
    torch.testing.assert_close((codes @ W_dec + b_dec) * scale, sae.decode(expected))


def test_what_inference_auto_chooses():
    choices = {name: formats.inference_rule(trained(**rule).cfg, "auto") for name, rule in RULES.items()}
    assert choices == {name: "topk" if name == "topk" else "threshold" for name in RULES}


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


def of_a_training(folder, sae, **activations):
    """As `sampled-sae train` leaves it."""
    activations = {"model": "org/model", "layer": 3, "context": 64, "scale": 0.5, **activations}
    sae.cfg = replace(sae.cfg, input_scale=activations["scale"])
    sae.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"activations": activations}))
    return sae


def test_an_sae_of_the_command_line_there_and_back(tmp_path, capsys):
    sae = of_a_training(tmp_path / "sae", trained())
    assert main(["export", str(tmp_path / "sae"), str(tmp_path / "out"), "--to", "saelens"]) == 0
    said = capsys.readouterr().out
    assert "divided by 0.5" in said
    assert str(tmp_path / "out/cfg.json") in said
    metadata = config_of(tmp_path / "out", "saelens")["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("org/model", "blocks.3.hook_resid_post")
    assert torch.equal(tensors_of(tmp_path / "out", "saelens")["b_dec"], sae.b_dec * 2)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert same_files(tmp_path / "sae", tmp_path / "back", OURS)
    assert "configuration and training state" in capsys.readouterr().out


def test_what_the_training_was_on_is_overruled(tmp_path):
    sae = of_a_training(tmp_path / "sae", trained(), scale=0.25)
    store = write_store(tmp_path / "store")
    there = ["export", str(tmp_path / "sae"), str(tmp_path / "out"), "--to", "saelens"]
    for options, factor in (([], 4), (["--scale", "1"], 1), (["--activations", str(store)], 2)):
        assert main([*there, *options]) == 0
        assert torch.equal(tensors_of(tmp_path / "out", "saelens")["b_dec"], sae.b_dec * factor)
    assert main([*there, "--model-name", "m", "--layer", "7"]) == 0
    metadata = config_of(tmp_path / "out", "saelens")["metadata"]
    assert (metadata["model_name"], metadata["hook_layer"], metadata["context_size"]) == ("m", 7, 64)
    assert metadata["hook_name"] == "blocks.7.hook_resid_post"


@pytest.mark.parametrize("to", formats.FORMATS)
def test_theirs_there_and_back_says_the_same(tmp_path, to):
    """Weights, configuration, origin and scale, by way of a folder of ours."""
    origin = formats.Origin("org/model", 5, "blocks.5.hook_resid_pre", 128)
    formats.export(trained(input_scale=0.25), tmp_path / "theirs", to=to, origin=origin, **rule_for(to))
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    inference = [text for name, value in rule_for(to).items() for text in (f"--{name}", value)]
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", to, *inference]) == 0
    assert same_files(tmp_path / "theirs", tmp_path / "again", [*FILES[to], "sampled_sae.safetensors"])
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "moved"), "--to", "saelens", "--layer", "6"]) == 0
    assert config_of(tmp_path / "moved", "saelens")["metadata"]["hook_name"] == "blocks.6.hook_resid_post"


def test_what_a_folder_says_of_its_sae_stays_true(tmp_path, capsys):
    of_a_training(tmp_path / "sae", trained())
    there = ["export", str(tmp_path / "sae"), str(tmp_path / "out"), "--to", "saelens"]
    assert main(there) == 0
    before = (tmp_path / "sae/sae.safetensors").read_bytes()
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "sae")]) == 1
    assert "sae: holds run.json of an SAE that was trained there" in capsys.readouterr().err
    assert (tmp_path / "sae/sae.safetensors").read_bytes() == before
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/checkpoint.pt").write_bytes(b"")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "begun")]) == 1
    assert "begun: holds checkpoint.pt of an SAE that was trained there" in capsys.readouterr().err
    (tmp_path / "sae/run.json").write_text("{}")
    assert main(there) == 1
    assert "run.json: activations=None: must be of type dict" in capsys.readouterr().err
    (tmp_path / "sae/run.json").rename(tmp_path / "sae/origin.json")
    (tmp_path / "sae/origin.json").write_text('{"hook": 3}')
    assert main(there) == 1
    assert "origin.json: " in capsys.readouterr().err


def test_errors_of_the_commands_exit_with_1(tmp_path, capsys):
    trained().save_pretrained(tmp_path / "sae")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "sae"), str(out), "--to", "sparsify"]) == 1
    assert "(--inference topk)" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "sae"), str(out), "--to", "sparsify", "--inference", "topk", "--k", "3"]) == 0
    assert main(["import", str(out), str(out)]) == 1
    assert "holds an SAE in the format 'sparsify'" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing"), str(tmp_path / "b")]) == 1
    assert "no SAE in a known format" in capsys.readouterr().err
    assert main(["import", str(out), str(tmp_path / "b"), "--from", "saelens"]) == 1
    assert "sae_weights.safetensors: no such file" in capsys.readouterr().err
    without_extra(out)
    assert main(["import", str(out), str(tmp_path / "b"), "--scale", "2", "--k", "5"]) == 0
    assert SampledSAE.from_pretrained(tmp_path / "b").cfg.k == 5
    assert torch.equal(SampledSAE.from_pretrained(tmp_path / "b").b_dec, trained().b_dec * 2)


@pytest.mark.slow
def test_the_installed_command(tmp_path):
    trained().save_pretrained(tmp_path / "sae")
    folders = [tmp_path / "sae", tmp_path / "out"]
    command = [sys.executable, "-m", "sampled_sae", "export", *folders, "--to", "dictionary_learning"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out/ae.pt") in done.stdout
    assert formats.load(tmp_path / "out").cfg == trained().cfg
