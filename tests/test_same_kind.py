"""SAE, activations and model must belong together, and results keep their names."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from makers import D, harvested, make_sae, tokens

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.evaluation import evaluate_activations
from sampled_sae.training.same_settings import in_words, is_same_kind
from sampled_sae.training.sweep import EVALUATION, evaluate, merged, run_sweep

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=6, batch_size=64, checkpoint_every=6, log_every=2)
OPTIONS = ["--features", "96", "--k", "3", "--steps", "6", "--batch-size", "64", "--quiet"]


def written(folder, **given):
    return ActivationStore.write(folder, tokens(400, D, dtype=torch.float32), holdout=150, **given)


WEIGHTS = {"weights_sha256": "ab" * 32}
STORES = {
    "model": lambda f: harvested(f),
    "other model": lambda f: harvested(f, model="another"),
    "other layer": lambda f: harvested(f, layer=9),
    "other weights": lambda f: harvested(f, settings={"weights_sha256": "cd" * 32}),
    "these weights": lambda f: harvested(f, settings=WEIGHTS),
    "these weights by another name": lambda f: harvested(f, settings=WEIGHTS, model="a/copy"),
    "other texts": lambda f: harvested(f, source="other texts", seed=8),
    "source one": lambda f: written(f, source="one"),
    "source two": lambda f: written(f, source="two"),
    "unnamed": lambda f: written(f),
}
PAIRS = [  # (trained on, evaluated on, what is said; None where it belongs together)
    ("model", "other model", "was trained on layer 0 of made, but .* holds layer 0 of another"),
    ("model", "other layer", "layer 0 of made, but .* holds layer 9 of made"),
    ("model", "source one", "layer 0 of made, but .* holds source 'one'"),
    ("model", "unnamed", "layer 0 of made, but .* holds activations without a name"),
    ("source one", "source two", "source 'one', but .* holds source 'two'"),
    ("source two", "model", "source 'two', but .* holds layer 0 of made"),
    ("unnamed", "source one", "activations without a name, but .* holds source 'one'"),
    ("these weights", "other weights", r"layer 0 of made \(weights abababab\), but .* of made \(weights cdcdcdcd\)"),
    ("these weights", "these weights by another name", None),
    ("model", "other texts", None),
    ("model", "these weights", None),  # one of them does not say which weights
    ("source one", "source one", None),
    ("unnamed", "unnamed", None),
]


@pytest.mark.parametrize(("one", "other", "message"), PAIRS)
def test_evaluate_on_other_activations(tmp_path, capsys, one, other, message):
    store, here = STORES[one](tmp_path / "a"), STORES[other](tmp_path / "b")
    run = tmp_path / "run"
    Trainer(SAE, TRAIN, store, run).run(progress=False)
    before = {"fvu": "what was evaluated before"}
    write_json(run / EVALUATION, before)
    command = ["evaluate", str(run), str(here.folder), "--splice-rows", "0"]
    assert main(command) == (0 if message is None else 1)
    if message is None:
        assert read_json(run / EVALUATION)["tokens"] == 150
        return
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert "--insist" in line
    assert read_json(run / EVALUATION) == before
    assert main([*command, "--insist"]) == 0
    assert read_json(run / EVALUATION)["tokens"] == 150


def test_other_widths_are_refused_with_insist_too(tmp_path, capsys):
    Trainer(SAE, TRAIN, harvested(tmp_path / "a"), tmp_path / "run").run(progress=False)
    narrow = harvested(tmp_path / "b", d=8)
    assert main(["evaluate", str(tmp_path / "run"), str(narrow.folder), "--splice-rows", "0", "--insist"]) == 1
    assert "d_in=12, but the activations in" in capsys.readouterr().err


def test_an_imported_sae_is_held_to_its_origin(tmp_path, capsys):
    make_sae(torch.float32).save_pretrained(tmp_path / "sae")
    store = harvested(tmp_path / "a")
    command = ["evaluate", str(tmp_path / "sae"), str(store.folder), "--splice-rows", "0"]
    assert main(command) == 0
    assert "Nothing tells whether" in capsys.readouterr().err
    for model, layer, status in (("made", 0, 0), ("made", None, 0), ("made", 3, 1), ("gpt2", 0, 1)):
        write_json(tmp_path / "sae" / "origin.json", {"model_name": model, "layer": layer, "scale": 1.0})
        assert main(command) == status, (model, layer)


@pytest.mark.parametrize(
    ("layer", "hook", "status"),
    [
        (0, "blocks.0.hook_resid_post", 0),
        (0, "model.layers.0", 0),
        (1, "blocks.1.hook_resid_pre", 0),
        (0, "blocks.0.hook_resid_pre", 1),
        (0, "blocks.0.hook_mlp_out", 1),
        (0, "blocks.0.attn.hook_z", 1),
    ],
)
def test_an_imported_sae_of_another_place_in_the_block(tmp_path, capsys, layer, hook, status):
    make_sae(torch.float32).save_pretrained(tmp_path / "sae")
    origin = {"model_name": "made", "layer": layer, "hook_name": hook, "scale": 1.0}
    write_json(tmp_path / "sae" / "origin.json", origin)
    store = harvested(tmp_path / "a")
    assert main(["evaluate", str(tmp_path / "sae"), str(store.folder), "--splice-rows", "0"]) == status
    assert ("was trained on layer" in capsys.readouterr().err) == bool(status)


def test_a_training_on_other_activations_names_both(tmp_path):
    Trainer(SAE, TRAIN, harvested(tmp_path / "a"), tmp_path / "run").run(progress=False)
    other = harvested(tmp_path / "b", layer=9, seed=8)
    with pytest.raises(ValueError, match="layer was 0, is 9"):
        Trainer(SAE, TRAIN, other, tmp_path / "run")


def test_unnamed_activations_other_than_those_trained_on_are_noted(tmp_path, capsys):
    store = written(tmp_path / "a")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert main(["evaluate", str(tmp_path / "run"), str(store.folder)]) == 0
    assert capsys.readouterr().err == ""
    other = ActivationStore.write(tmp_path / "b", tokens(400, D, seed=9, dtype=torch.float32), holdout=50)
    assert main(["evaluate", str(tmp_path / "run"), str(other.folder)]) == 0
    assert "Nothing tells whether" in capsys.readouterr().err


def test_in_words_and_same_kind_by_hand():
    assert in_words({"model": "m"}) == "an unknown layer of m"
    assert is_same_kind({"source": ""}, {"source": None})
    assert not is_same_kind({"model": "m", "layer": 1}, {"model": "m", "layer": 2})
    assert is_same_kind({"model": "m", "layer": 1}, {"model": "m"})


def test_no_result_overwrites_another(tmp_path):
    sae, x = make_sae(torch.float32), tokens(150, D, dtype=torch.float32)
    sae.calibrate(x)
    names = evaluate_activations(sae, x, 64).keys()
    for name in ("fvu", "l0", "threshold"):
        assert name in names
        with pytest.raises(ValueError, match=f"two results are named {name}: each needs a name of its own"):
            evaluate(sae, x, 64, lambda reconstruct, name=name: {name: 1.0, "ce_clean": 2.0})
    with pytest.raises(ValueError, match="two results are named predicted_tokens"):
        evaluate(sae, x, 64, lambda reconstruct: {"predicted_tokens": 1.0, "tokens": 2.0})
    for wrong in (x[None], x.tolist()):
        with pytest.raises(ValueError, match=r"x=.*: must be a tensor \[n, d_in\]"):
            evaluate_activations(sae, wrong)
    assert merged({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="named a, b"):
        merged({"a": 1, "b": 2, "c": 3}, {"b": 2, "a": 1})
    with pytest.raises(ValueError, match="two results are named seed"):
        run_sweep(
            {"a": SAE},
            TRAIN,
            harvested(tmp_path / "a"),
            tmp_path / "s",
            lambda reconstruct: {"seed": 3},
            progress=False,
        )


def test_the_table_counts_the_held_out_tokens(tmp_path):
    store = harvested(tmp_path / "a")
    run_sweep({"a": SAE}, TRAIN, store, tmp_path / "s", lambda reconstruct: {"tokens": 7}, progress=False)
    with open(tmp_path / "s" / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["tokens"], row["predicted_tokens"]) == ("150", "7")


def test_metrics_are_strict_json(tmp_path):
    """One token a batch has no variance, so that its FVU is no number."""
    Trainer(SAE, replace(TRAIN, batch_size=1), harvested(tmp_path / "a"), tmp_path / "run").run(progress=False)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["fvu"] for line in lines] == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--splice-rows", "4"], "--splice-rows 4: must be from 0 to 3, the held-out rows in"),
        (["--splice-rows", "-1"], "--splice-rows -1: must be from 0 to 3"),
        (["--batch-size", "0"], "batch.size.0: must be a whole number >= 1"),
        (["--model", "other"], "holds layer 0 of made, and --model other gives layer 0 of other"),
    ],
)
def test_options_of_evaluate_are_checked_first(tmp_path, capsys, monkeypatch, options, message):
    store = harvested(tmp_path / "a")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    monkeypatch.setattr("sampled_sae.cli.training.evaluated", lambda *given: pytest.fail("evaluated"))
    assert main(["evaluate", str(tmp_path / "run"), str(store.folder), *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / EVALUATION).exists()


def test_a_model_for_activations_without_text(tmp_path, capsys):
    store = written(tmp_path / "a", source="one")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert main(["evaluate", str(tmp_path / "run"), str(store.folder), "--model", "gpt2"]) == 1
    assert "has no token rows" in capsys.readouterr().err
