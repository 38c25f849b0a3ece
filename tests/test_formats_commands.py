"""`sampled-sae export` and `sampled-sae import`."""

import json
import subprocess
import sys

import pytest
import torch
from format_makers import FILES, OURS, config_of, rule_for, same_files, tensors_of, trained, without_extra
from makers import write_store

from sampled_sae import SampledSAE, formats
from sampled_sae.cli import main


def of_a_training(folder, sae, **activations):
    """As `sampled-sae train` leaves it."""
    sae.save_pretrained(folder)
    activations = {"model": "org/model", "layer": 3, "context": 64, "scale": 0.5, **activations}
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
    formats.export(trained(), tmp_path / "theirs", to=to, scale=0.25, origin=origin, **rule_for(to))
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
    assert "run.json: activations=None: must say what the SAE was trained on" in capsys.readouterr().err
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


def test_the_installed_command(tmp_path):
    trained().save_pretrained(tmp_path / "sae")
    command = [
        sys.executable,
        "-m",
        "sampled_sae",
        "export",
        tmp_path / "sae",
        tmp_path / "out",
        "--to",
        "dictionary_learning",
    ]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out/ae.pt") in done.stdout
    assert formats.load(tmp_path / "out").cfg == trained().cfg
