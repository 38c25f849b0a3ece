"""The command train on a language model at work, without a store."""

import json
import random

import pytest
import torch
from tiny_models import D

from sampled_sae import SampledSAE
from sampled_sae.cli import main
from sampled_sae.lm import ModelSource


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    draw = random.Random(0)
    file.write_text(" ".join(f"w{draw.randrange(40)}" for _ in range(4000)))
    return file


def command(model, texts, out, layers, *more):
    sizes = ["--context", "8", "--features", "48", "--k", "3", "--batch-size", "32", "--buffer-tokens", "128"]
    return ["train", str(out), "--model", str(model), "--texts", str(texts), "--layer", layers, *sizes, *more]


def test_the_command_trains_without_a_store_and_goes_on(causal, texts, tmp_path, capsys):
    assert main([*command(causal, texts, tmp_path / "run", "2", "--steps", "6"), "--model-dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "stores nothing" in said
    sae = SampledSAE.from_pretrained(tmp_path / "run")
    assert sae.cfg.d_in == D
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [
        ".json",
        ".json",
        ".jsonl",
        ".pt",
        ".safetensors",
    ]
    assert main([*command(causal, texts, tmp_path / "run", "2", "--steps", "9"), "--model-dtype", "bfloat16"]) == 0
    assert "Resumes at step 6" in capsys.readouterr().out
    assert main(command(causal, texts, tmp_path / "run", "2", "--steps", "9")) == 1
    assert "weights_sha256" in capsys.readouterr().err


def test_blocks_may_lie_on_disk(causal, texts, tmp_path, capsys):
    (tmp_path / "blocks").mkdir()
    on_disk = ["--buffer-on-disk", str(tmp_path / "blocks")]
    for name, more in (("memory", []), ("disk", on_disk)):
        assert main([*command(causal, texts, tmp_path / name, "2", "--steps", "9"), *more]) == 0
    weights = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("memory", "disk")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "blocks").iterdir())
    assert main(command(causal, texts, tmp_path / "disk", "2", "--steps", "12")) == 0, "goes on in memory"
    capsys.readouterr()
    assert main([*command(causal, texts, tmp_path / "new", "2"), "--buffer-on-disk", str(tmp_path / "no")]) == 1
    assert f"--buffer-on-disk {tmp_path / 'no'}: must be a folder that is there" in capsys.readouterr().err


def test_the_command_trains_several_layers_and_one_is_evaluated(causal, texts, tmp_path, capsys):
    out = tmp_path / "runs"
    assert main(command(causal, texts, out, "0,2", "--steps", "5", "--holdout-rows", "10")) == 0
    assert sorted(path.name for path in out.iterdir()) == ["layer_0", "layer_2"]
    at_end = json.loads((out / "layer_2" / "evaluation.json").read_text())
    assert 10 < at_end["tokens"] <= 10 * 7
    assert at_end["ce_zero"] != at_end["ce_spliced"]
    assert (out / "layer_0" / "evaluation.json").exists()
    held_out = ["harvest", str(tmp_path / "acts"), "--model", str(causal), "--texts", str(texts), "--layer", "2"]
    assert main([*held_out, "--context", "8", "--tokens", "80", "--holdout-rows", "9"]) == 0
    assert main(["evaluate", str(out / "layer_2"), str(tmp_path / "acts"), "--splice-rows", "4"]) == 0
    assert main(["evaluate", str(out / "layer_0"), str(tmp_path / "acts")]) == 1
    assert "layer 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: [*c, "--layer", "9"], "--layer 9 must be an integer from 0 to 3"),
        (lambda c: [*c, "--layer", "1,1"], "--layer [1, 1]: none twice"),
        (lambda c: [a for a in c if a not in ("--layer", "1")], "--layer None: must be given with --model"),
        (lambda c: [*c, "--holdout", "5"], "--holdout 5: is for a file"),
        (lambda c: [*c, "--buffer-tokens", "16"], "--batch-size 32: must be at most 16"),
        (lambda c: [*c, "--texts", "nowhere.txt"], "--texts 'nowhere.txt'"),
        (lambda c: [*c, "--model-device", "nowhere"], "--model-device 'nowhere': must be 'cpu', 'cuda' or"),
        (lambda c: [*c, "--layer", "1,2", "--lanes", "1"], "--lanes 1: is for one SAE"),
        (lambda c: [*c, "--holdout-rows", "-1"], "--holdout-rows -1: must be a whole number >= 0"),
        (lambda c: [*c, "--skip"], "--skip True: is of a transcoder"),
    ],
)
def test_the_command_says_what_is_wrong(causal, texts, tmp_path, capsys, change, said):
    assert main([*change(command(causal, texts, tmp_path / "run", "1", "--steps", "3")), "--quiet"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_splice_without_memory_is_no_reason_to_fail_a_run_that_is_done(causal, texts, tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ModelSource, "splice", fails)
    words = command(causal, texts, tmp_path / "run", "1", "--steps", "3", "--holdout-rows", "10")
    assert main(words) == 0
    said = capsys.readouterr()
    assert "No loss recovered: not enough memory (CUDA out of memory)" in said.err
    assert "loss recovered not measured" in said.out.splitlines()[-1]
    assert main([*words, "--splice-rows", "2"]) == 1


def test_options_of_a_model_need_one(tmp_path, capsys):
    torch.save(torch.randn(100, 4), tmp_path / "x.pt")
    assert main(["train", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--layer", "3"]) == 1
    assert "--layer [3]: goes with --model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "run")])
    assert stopped.value.code == 2


def test_a_transcoder_on_a_model_at_work_by_command(causal, texts, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", run, "--model", causal, "--texts", texts, "--context", 16, "--layer", 1, "--mlp", "--skip"]
    how = ["--features", 32, "--k", 3, "--l", 2, "--steps", 4, "--batch-size", 32, "--buffer-tokens", 128, "--quiet"]
    assert main([str(argument) for argument in [*command, *how]]) == 0
    assert SampledSAE.from_pretrained(run).cfg.skip
    capsys.readouterr()
    for options, said in (
        (["--layer", "1", "--skip"], "give --mlp, or two places"),
        (["--layer", "1,2", "--mlp"], "--mlp is of one block"),
        (["--layer", "1", "--points", "a:in", "b:out"], "name both places, without --layer"),
        (["--points", "a:in", "b:out"], "no module of this name"),
    ):
        arguments = ["train", tmp_path / "other", "--model", causal, "--texts", texts, "--context", 16, *options]
        assert main([str(argument) for argument in arguments]) == 1
        assert said in capsys.readouterr().err


def test_a_crosscoder_by_command_without_a_store(causal, texts, tmp_path, capsys):
    run = [*command(causal, texts, tmp_path / "run", "0", "--steps", "6", "--holdout-rows", "6"), "--beside", "1", "2"]
    assert main(run) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(result["fvu_layers"]) == len(result["ce_spliced_layers"]) == 3
    assert SampledSAE.from_pretrained(tmp_path / "run").cfg.layers == 3
    capsys.readouterr()
    for more, said in (
        (["--beside", "one"], "--beside one: with --model must be blocks"),
        (["--beside", "0"], "none twice"),
        (["--beside", "1", "--mlp"], "stands beside one --layer"),
    ):
        assert main([*command(causal, texts, tmp_path / "other", "0", "--steps", "2"), *more]) == 1
        assert said in capsys.readouterr().err


def test_an_encoder_is_evaluated_without_a_splice_and_one_that_is_asked_for_is_refused_first(
    bert, texts, tmp_path, capsys
):
    words = command(bert, texts, tmp_path / "run", "1", "--steps", "3", "--holdout-rows", "10")
    assert main([*words, "--splice-rows", "2"]) == 1
    assert "predicts no next token; leave it out, or give 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.count("is an encoder and predicts no next token") == 1
    assert "loss recovered not measured" in said.out.splitlines()[-1]
