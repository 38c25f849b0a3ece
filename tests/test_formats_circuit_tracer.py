"""Transcoders in circuit-tracer's files: what stands in them, there and back, and what has no place."""

import json
from dataclasses import replace

import pytest
import torch
from makers import make_sae, same_weights, tokens
from safetensors.torch import load_file, save_file

from sampled_sae import SampledSAE
from sampled_sae.cli import main
from sampled_sae.formats.circuit_tracer import THRESHOLD, export_transcoder, layers_in, load_transcoder

yaml = pytest.importorskip("yaml")

X = tokens(40, 12, dtype=torch.float32)
MODEL = {"model_name": "some/model"}


def transcoder(skip=False, seed=0, **rule):
    sae = make_sae(torch.float32, seed, d_out=12, skip=skip, **{"l": None, **rule})
    sae.calibrate(X, 4)
    return sae.eval()


def as_read_there(folder, layer, x):
    """What that library computes from its files."""
    t, config = load_file(folder / f"layer_{layer}.safetensors"), yaml.safe_load((folder / "config.yaml").read_text())
    a = torch.nn.functional.linear(x, t["W_enc"], t["b_enc"])
    if config.get("activation") == "topk":
        codes = torch.zeros_like(a).scatter(1, a.topk(config["k"]).indices, 1) * a
    else:
        codes = a * (a > t.get(THRESHOLD, torch.zeros(())))
    return codes @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [{}, {"select": "token"}], ids=["threshold", "topk"])
def test_it_computes_there_what_it_does_here_and_comes_back(tmp_path, skip, rule):
    saes = [transcoder(skip, seed, **rule) for seed in (0, 1)]
    for layer, sae in enumerate(saes):
        export_transcoder(sae, tmp_path, layer, **MODEL)
    assert layers_in(tmp_path) == [0, 1]
    for layer, sae in enumerate(saes):
        torch.testing.assert_close(as_read_there(tmp_path, layer, X), sae(X, X).x_hat)
        back = load_transcoder(tmp_path, layer, k=None if rule else 4)
        assert torch.equal(back(X, X).x_hat, sae(X, X).x_hat)
        files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
        export_transcoder(back, tmp_path, layer, **MODEL)
        assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == files


def test_scales_are_folded(tmp_path):
    sae, said = transcoder(skip=True), []
    scaled = SampledSAE(replace(sae.cfg, input_scale=0.5, output_scale=3.0))
    scaled.load_state_dict(dict(sae.named_parameters()), strict=False)
    scaled.eval().calibrate(X, 4)
    export_transcoder(scaled, tmp_path, 0, **MODEL, say=said.append)
    assert any("scales 0.5 and 3.0 are folded" in line for line in said)
    torch.testing.assert_close(as_read_there(tmp_path, 0, X), scaled(X, X).x_hat)


def test_files_of_others(tmp_path):
    """A relu set as published: no thresholds; and one with a threshold for each feature."""
    g = torch.Generator().manual_seed(0)
    t = {"W_enc": (20, 6), "W_dec": (20, 6), "b_enc": (20,), "b_dec": (6,), "W_skip": (6, 6)}
    t = {name: torch.randn(*shape, generator=g) for name, shape in t.items()}
    save_file(t, tmp_path / "layer_0.safetensors")
    config = {"model_name": "some/model", "model_kind": "transcoder_set", "feature_input_hook": "hook_resid_mid"}
    config |= {"feature_output_hook": "hook_mlp_out", "scan": "somewhere"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    x = torch.randn(9, 6, generator=g)
    torch.testing.assert_close(load_transcoder(tmp_path, 0, k=3)(x, x).x_hat, as_read_there(tmp_path, 0, x))
    save_file({**t, THRESHOLD: torch.rand(20, generator=g) + 0.1}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ValueError, match="threshold of each feature"):
        load_transcoder(tmp_path, 0, k=3)
    rescaled = load_transcoder(tmp_path, 0, k=3, rescale_features=True)
    torch.testing.assert_close(rescaled(x, x).x_hat, as_read_there(tmp_path, 0, x))
    with pytest.raises(ValueError, match="k: the file does not say it"):
        load_transcoder(tmp_path, 0, rescale_features=True)


@pytest.mark.parametrize(
    ("sae", "said"),
    [
        (lambda: make_sae(torch.float32), "d_out=None: circuit_tracer reads transcoders"),
        (lambda: make_sae(torch.float32, d_out=7), "d_out=7: circuit_tracer reads transcoders with d_out = d_in=12"),
        (lambda: transcoder(groups=(40, 96)), r"groups=\(40, 96\): circuit_tracer has no place"),
        (lambda: transcoder(inference="batch"), "depends on the whole batch"),
        (lambda: transcoder(d_sae=80), r"W_enc is \(96, 12\), that of layer 1 \(80, 12\)"),
        (lambda: transcoder(skip=True), r"W_skip is None, that of layer 1 \(12, 12\)"),
        (lambda: transcoder(select="token"), "activation=None, this transcoder has 'topk'"),
    ],
)
def test_what_has_no_place_is_named_and_nothing_written(tmp_path, sae, said):
    export_transcoder(transcoder(), tmp_path, 0, **MODEL)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=said):
        export_transcoder(sae(), tmp_path, 1, **MODEL)
    with pytest.raises(ValueError, match="rule='relu'"):
        export_transcoder(transcoder(), tmp_path, 1, **MODEL, rule="relu")
    with pytest.raises(ValueError, match="model_name='some/model', this transcoder has 'other'"):
        export_transcoder(transcoder(), tmp_path, 1, model_name="other")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"model_kind": "cross_layer_transcoder"}, {}, "model_kind='cross_layer_transcoder': must be"),
        ({"activation": "gelu"}, {}, "activation='gelu': must be relu"),
        ({"activation": "topk"}, {}, "k"),
        ({"activation": "topk", "k": 3}, {}, "but config.yaml says activation 'topk'"),
        ({"transcoders": ["hf://a/b/c"]}, {}, "names files elsewhere"),
        ({}, {"W_dec": torch.ones(12, 96)}, r"W_dec is \(12, 96\), must be \(96, 12\)"),
        ({}, {"W_enc": torch.ones(96)}, r"W_enc=\[96\]: must be a matrix"),
        ({}, {"b_enc": torch.full((96,), torch.nan)}, "b_enc holds NaN"),
        ({}, {"log_thresholds": torch.ones(96)}, r"unknown \['log_thresholds'\]"),
        ({"activation": "relu"}, {}, "but config.yaml says activation 'relu'"),
        ({}, {THRESHOLD: torch.full((96,), -0.5)}, "is below 0 for 96 features"),
        ({}, {THRESHOLD: torch.linspace(-0.1, 1, 96)}, "is below 0 for 9 features"),
        ({}, {THRESHOLD: torch.full((96,), torch.inf)}, "activation_function.threshold holds NaN or inf"),
    ],
)
def test_foreign_files_are_named(tmp_path, config, tensors, said):
    export_transcoder(transcoder(), tmp_path, 0, **MODEL)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **config}))
    file = tmp_path / "layer_0.safetensors"
    save_file({**load_file(file), **tensors}, file)
    with pytest.raises(ValueError, match=said):
        load_transcoder(tmp_path, 0, k=4)
    path.write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml: is no YAML"):
        load_transcoder(tmp_path, 0, k=4)
    path.unlink()
    with pytest.raises(ValueError, match=r"config\.yaml: no such file"):
        load_transcoder(tmp_path, 0, k=4)


def test_commands(tmp_path, capsys):
    sae, run = transcoder(skip=True, select="token"), tmp_path / "run"
    sae.save_pretrained(run)
    about = {"model": "some/model", "point": "model.layers.0.mlp:in"}
    (run / "run.json").write_text(json.dumps({"activations": about}))
    to = ["--to", "circuit_tracer"]
    assert main(["export", str(run), str(tmp_path / "set"), *to]) == 0
    assert main(["export", str(run), str(tmp_path / "set"), *to, "--layer", "1"]) == 0
    assert layers_in(tmp_path / "set") == [0, 1]
    assert main(["import", str(tmp_path / "set"), str(tmp_path / "back"), "--layer", "1"]) == 0
    back = SampledSAE.from_pretrained(tmp_path / "back")
    assert same_weights(back, load_transcoder(tmp_path / "set", 1))
    assert json.loads((tmp_path / "back" / "origin.json").read_text())["layer"] == 1
    capsys.readouterr()
    for command, said in (
        (["export", str(run), str(tmp_path / "set"), *to, "--k", "3"], "--k 3: circuit-tracer's files have no place"),
        (["import", str(tmp_path / "set"), str(tmp_path / "b")], "has the layers [0, 1]; name one with --layer"),
        (["import", str(tmp_path / "set"), str(tmp_path / "b"), "--layer", "2"], "has the layers [0, 1]"),
        (["import", str(run), str(tmp_path / "b"), "--layer", "2"], "--layer 2: is of circuit-tracer's files"),
    ):
        assert main(command) == 1
        assert said in capsys.readouterr().err
