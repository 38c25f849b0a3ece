"""`sampled-sae harvest` and `evaluate` on causal models and encoders: what is checked first, and the whole way."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LAYERS, SIZES, WORDS, D, tiny, transformers

from sampled_sae import lm
from sampled_sae.cli import main

tokenizers = pytest.importorskip("tokenizers")


def command(model, texts, out, *more):
    arguments = ["harvest", out, "--model", model, "--texts", texts, "--layer", 1, "--context", 16, "--quiet", *more]
    return main([str(argument) for argument in arguments])


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


TRAINING = ["--features", "32", "--k", "3", "--l", "2", "--steps", "6", "--batch-size", "64", "--quiet"]


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_bert_with_its_own_tokenizer(bert, texts, tmp_path, capsys, layer):
    acts, run = tmp_path / "acts", tmp_path / "run"
    assert command(bert, texts, acts, "--holdout-rows", "5", "--layer", layer) == 0
    manifest = manifest_of(acts)
    rows = load_file(acts / "holdout.safetensors")["rows"]
    assert (rows[:, 0] == 2).all()
    assert (rows[:, -1] == 3).all()
    assert manifest["settings"]["drop_tokens"] == [0, 2, 3, 4]
    inner_seps = int((rows[:, 1:] == 3).sum())
    assert manifest["holdout"]["dropped"] == {"first_position": 5, "special_token": inner_seps, "norm": 0}
    assert main(["train", str(acts), str(run), *TRAINING]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), str(acts), "--model", str(bert)]) == 0
    said = capsys.readouterr()
    assert "is an encoder and predicts no next token" in said.err
    result = json.loads((run / "evaluation.json").read_text())
    assert result["tokens"] == manifest["holdout"]["tokens"]
    assert "loss_recovered_zero" not in result
    assert main(["evaluate", str(run), str(acts), "--model", str(bert), "--splice-rows", "0"]) == 0
    assert main(["evaluate", str(run), str(acts), "--model", str(bert), "--splice-rows", "2"]) == 1
    assert "--splice-rows 2: " in (said := capsys.readouterr().err)
    assert "predicts no next token; leave it out, or give 0" in said


@pytest.mark.parametrize(
    ("option", "dropped"), [(None, [0, 1, 2]), ("none", []), ("special, 7,7", [0, 1, 2, 7]), ("9", [9])]
)
def test_tokens_to_leave_out(causal, texts, tmp_path, option, dropped):
    acts = tmp_path / "acts"
    assert command(causal, texts, acts, *([] if option is None else ["--drop-tokens", option])) == 0
    manifest = manifest_of(acts)
    assert manifest["settings"]["drop_tokens"] == dropped
    assert (manifest["dropped"]["special_token"] > 0) == bool(dropped)


def test_no_holdout_to_the_end(causal, texts, tmp_path, capsys):
    acts, run = tmp_path / "acts", tmp_path / "run"
    assert command(causal, texts, acts, "--holdout-rows", "0") == 0
    assert manifest_of(acts)["complete"] is True
    assert manifest_of(acts)["holdout"] is None
    assert command(causal, texts, acts, "--holdout-rows", "0") == 0
    assert main(["train", str(acts), str(run), *TRAINING]) == 0
    assert main(["evaluate", str(run), str(acts), "--model", str(causal)]) == 1
    assert "no held-out part" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--layer", 2), ("--context", 12), ("--dtype", "float16")])
def test_a_folder_of_another_harvest_is_known_before_the_weights_are_loaded(
    causal, texts, tmp_path, monkeypatch, capsys, option, value
):
    assert command(causal, texts, tmp_path) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    capsys.readouterr()
    assert command(causal, texts, tmp_path, option, value) == 1
    assert f"was harvested with {option} " in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "missing.jsonl"], "'missing.jsonl' is no file or folder"),
        (["--texts", "texts.docx"], "'texts.docx' is no file or folder"),
        (["--layer", LAYERS], f"--layer {LAYERS} must be an integer from 0 to {LAYERS - 1} in this model"),
        (["--layer", -1], "--layer -1 must be an integer from 0 to"),
        (["--context", 33], "--context 33 must be at most 32, the positions of LlamaForCausalLM"),
        (["--context", 1], "--context 1: must be a whole number >= 2"),
        (["--tokens", 0], "--tokens 0: must be a whole number >= 1"),
        (["--holdout-rows", -1], "--holdout-rows -1: must be a whole number >= 0"),
        (["--holdout-rows", 500], "--holdout-rows 500 must be from 0 to 52: there are 53 rows"),
        (["--tokens", 32, "--holdout-rows", 2], "--holdout-rows 2 must be from 0 to 1: there are 2 rows"),
        (["--batch-size", 0], "--batch-size 0: must be"),
        (["--drop-tokens", 45], "--drop-tokens 45: must be a token id from 0 to 44"),
    ],
)
def test_what_can_be_known_is_checked_before_the_weights_are_loaded(
    causal, texts, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    assert command(causal, texts, tmp_path / "acts", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "acts").exists()


def test_a_tokenizer_of_another_vocabulary_is_known_before_the_weights_are_loaded(
    causal, texts, tmp_path, monkeypatch, capsys
):
    shutil.copytree(causal, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    assert command(tmp_path / "model", texts, tmp_path / "acts") == 1
    assert "rows holds token ids from 1 to 44; the model knows 0 to 19" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_cannot_be_written_to(causal, texts, tmp_path, monkeypatch, capsys, inside):
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    out = a_file(tmp_path) / "acts" if inside else a_file(tmp_path)
    assert command(causal, texts, out) == 1
    assert "must be a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("T5", {"d_model": D, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 45}),
        ("ViT", {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("Wav2Vec2", {}),
    ],
)
def test_models_of_other_kinds_by_their_configuration(texts, tmp_path, capsys, name, given):
    getattr(transformers, f"{name}Config")(**given).save_pretrained(tmp_path / "model")
    assert command(tmp_path / "model", texts, tmp_path / "acts") == 1
    said = capsys.readouterr().err
    assert f"{name}Model" in said
    assert "supported are causal language models and encoders of text" in said


@pytest.mark.parametrize(("name", "limit"), [("Roberta", 32 - 2), ("MPNet", 32 - 2), ("Bert", 32)])
def test_positions_that_begin_after_the_padding(name, limit, rows):
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(tiny(name, "MaskedLM", **SIZES, pad_token_id=1).config)
    fits, too_long = (torch.full((1, context), 5) for context in (limit, limit + 1))
    lm.models.check_rows(model, fits)
    assert model(input_ids=fits).last_hidden_state.shape == (1, limit, D)
    with pytest.raises(ValueError, match=f"context={limit + 1} must be at most {limit}"):
        lm.models.check_rows(model, too_long)


def test_a_stream_is_read_as_far_as_the_tokens_need(causal, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, split, streaming):
        while True:
            asked.append(1)
            yield {"text": f"{' '.join(WORDS)} {len(asked)}"}

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert command(causal, "hf:endless", tmp_path / "acts", "--tokens", 320, "--holdout-rows", 4) == 0
    assert manifest_of(tmp_path / "acts")["settings"]["rows"] == 20
    assert len(asked) <= 1300


def test_harvest_command_says_what_it_leaves_out(causal, texts, tmp_path, capsys):
    arguments = ["harvest", tmp_path / "acts", "--model", causal, "--texts", texts, "--layer", 0, "--context", 16]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "without the tokens 0 <pad>, 1 <s>, 2 </s>" in said
    counts = manifest_of(tmp_path / "acts")["dropped"]
    assert f"left out: first_position {counts['first_position']}, special_token {counts['special_token']}, norm" in said


def test_a_transcoder_from_a_model_by_commands_alone(causal, texts, tmp_path):
    acts, run = tmp_path / "acts", tmp_path / "run"
    assert command(causal, texts, acts, "--mlp", "--holdout-rows", "5") == 0
    held_out = manifest_of(acts / "outputs")["holdout"]["tokens"]
    assert main(["train", str(acts), str(run), "--skip", *TRAINING, "--splice-rows", "3"]) == 0
    at_end = json.loads((run / "evaluation.json").read_text())
    assert at_end["tokens"] == held_out
    assert at_end["ce_zero"] != at_end["ce_spliced"] != at_end["ce_clean"]
    assert json.loads((run / "config.json").read_text())["sae"]["skip"]
    assert main(["evaluate", str(run), str(acts), "--splice-rows", "3", "--batch-size", "64", "--quiet"]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == at_end
    assert (
        main(["evaluate", str(run), str(acts / "inputs"), "--targets", str(acts / "outputs"), "--splice-rows", "0"])
        == 0
    )
    assert "ce_spliced" not in json.loads((run / "evaluation.json").read_text())
    two = ["--ls", "2,none", "--scores", "l2", "--no-topk", "--features", "32", "--k", "3", "--steps", "6"]
    sweep = tmp_path / "sweep"
    assert main(["sweep", str(acts), str(sweep), *two, "--batch-size", "64", "--splice-rows", "3", "--quiet"]) == 0
    rows = json.loads((sweep / "sweep.json").read_text())["rows"]
    assert [row["ce_clean"] for row in rows] == [pytest.approx(at_end["ce_clean"])] * 2
    assert "mlp:in to model.layers.1.mlp:out of" in (sweep / "report.md").read_text()


def test_what_two_places_cannot_be_is_said_before_the_model_is_loaded(causal, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sampled_sae.cli.harvest.loaded_model", None)
    mlp = "model.layers.1.mlp"
    for options, said in (
        (["--points", f"{mlp}:in", f"{mlp}:out", "--layer", "1"], "name both places, without --layer"),
        (["--points", f"{mlp}:in", mlp], "must be MODULE:in or MODULE:out"),
        (["--points", f"{mlp}s:in", f"{mlp}:out"], "no module of this name, as model.layers.1.mlp"),
        (["--mlp"], "give --layer"),
        ([], "give --layer"),
    ):
        arguments = ["harvest", tmp_path, "--model", causal, "--texts", texts, "--context", 16, *options]
        assert main([str(argument) for argument in arguments]) == 1
        assert said in capsys.readouterr().err


def test_an_sae_of_one_of_two_places_is_spliced_there(causal, texts, tmp_path, capsys):
    acts, run = tmp_path / "acts", tmp_path / "run"
    points = ["--points", "model.layers.1:in", "model.layers.2.self_attn:out"]
    arguments = ["harvest", acts, "--model", causal, "--texts", texts, "--context", 16, "--holdout-rows", 5, *points]
    assert main([str(argument) for argument in arguments]) == 0
    assert main(["train", str(acts / "outputs"), str(run), *TRAINING, "--splice-rows", "3"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["ce_zero"] != found["ce_spliced"]
    capsys.readouterr()
    assert main(["evaluate", str(run), str(acts / "inputs"), "--quiet"]) == 1
    assert "was trained on model.layers.2.self_attn:out of" in capsys.readouterr().err
