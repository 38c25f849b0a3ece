"""Sweeps over a language model at work, without a store."""

import json

import pytest
from tiny_models import D

from sampled_sae import SampledSAE
from sampled_sae.cli import main
from sampled_sae.lm import ModelSource

SIZES = ["--context", "8", "--features", "48", "--k", "3", "--batch-size", "16", "--buffer-tokens", "64"]
SWEEP = [*SIZES, "--ls", "2,none", "--scores", "l2", "--holdout-rows", "8", "--steps", "6", "--quiet"]


def sweep(model, texts, out, *more):
    return main(["sweep", str(out), "--model", str(model), "--texts", str(texts), *SWEEP, *map(str, more)])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_each_member_is_what_train_makes_of_the_same_stream(causal, texts, tmp_path, capsys, monkeypatch):
    passes, read = [], ModelSource._run
    monkeypatch.setattr(ModelSource, "_run", lambda self, *given: passes.append(1) or read(self, *given))
    assert sweep(causal, texts, tmp_path / "one", "--layer", 2, "--together", 3) == 0
    in_one_pass = len(passes)
    assert sweep(causal, texts, tmp_path / "parts", "--layer", 2, "--together", 1) == 0
    assert len(passes) - in_one_pass > in_one_pass, "each group reads the texts again"
    how = ["--model", causal, "--texts", texts, "--layer", 2, *SIZES, "--l", 2, "--steps", 6, "--holdout-rows", 8]
    assert main(["train", str(tmp_path / "run"), *map(str, how), "--quiet"]) == 0
    expected = files(tmp_path / "run")
    assert files(tmp_path / "one" / "l2_l2") == files(tmp_path / "parts" / "l2_l2") == expected
    rows = json.loads((tmp_path / "one" / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["l2_l2", "batchtopk", "topk"]
    at_end = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert rows[0]["loss_recovered_zero"] == at_end["loss_recovered_zero"]
    assert rows[0]["fvu"] == at_end["fvu"]
    assert "from a stream" in (tmp_path / "one" / "report.md").read_text()
    capsys.readouterr()
    assert sweep(causal, texts, tmp_path / "one", "--layer", 2) == 0, "nothing is done again"
    assert sweep(causal, texts, tmp_path / "one", "--layer", 1) == 1
    assert "made with other settings" in capsys.readouterr().err
    assert sweep(causal, texts, tmp_path / "one", "--layer", 2, "--buffer-tokens", 32) == 1, "another order"


@pytest.mark.parametrize(
    ("more", "kind"),
    [(["--layer", 1, "--mlp", "--skip"], {"d_out": D, "skip": True}), (["--layer", 1, "--beside", 2], {"layers": 2})],
)
def test_transcoders_and_crosscoders(causal, texts, tmp_path, more, kind):
    assert sweep(causal, texts, tmp_path / "sweep", *more, "--no-topk", "--ls", "none") == 0
    cfg = SampledSAE.from_pretrained(tmp_path / "sweep" / "batchtopk").cfg
    assert {name: getattr(cfg, name) for name in kind} == kind


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--layer None: must be given with --model"),
        (["--layer", "1,2"], "--layer [1, 2]: a sweep is of one"),
        (["--layer", "1", "--holdout-rows", "0"], "--holdout-rows 0: a sweep is evaluated on"),
        (["--layer", "1", "--insist"], "--insist True: is of stored activations"),
        (["--layer", "1", "--splice-rows", "9"], "--splice-rows 9: must be from 0 to 8"),
        (["--layer", "9"], "--layer 9 must be an integer from 0 to 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(causal, texts, tmp_path, capsys, more, said):
    assert sweep(causal, texts, tmp_path / "sweep", *more) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_options_of_a_model_at_work_need_one(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "out"), "--layer", "1"]) == 1
    assert "--model None: must be given with --layer" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "acts"), str(tmp_path / "out"), "--context", "8"]) == 1
    assert "--context 8: goes with --model, without stored activations" in capsys.readouterr().err
