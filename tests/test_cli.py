"""The command line, end to end, on a tiny language model made here."""

import csv
import json
import shutil

import pytest
import torch
from torch import distributed as dist
from word_models import save_word_llama

from sampled_sae.cli import build_parser, main
from sampled_sae.cli.closing import tried
from sampled_sae.support.all_ranks import RankError

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of a Llama with its tokenizer, file of texts)."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 2048}
    save_word_llama(folder / "model", WORDS, eos_token_id=0, **sizes)
    draw = torch.Generator().manual_seed(1)
    lines = [" ".join(WORDS[i] for i in torch.randint(0, 40, (30,), generator=draw).tolist()) for _ in range(60)]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder / "model", texts


@pytest.fixture(scope="module")
def harvested(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "activations"
    model, texts = tiny
    command = ["harvest", str(out), "--model", str(model), "--layer", "1", "--texts", str(texts)]
    assert main([*command, "--context", "16", "--holdout-rows", "10", "--quiet"]) == 0
    return out


TRAINING = ["--features", "64", "--k", "3", "--steps", "20", "--batch-size", "128"]


def test_train_then_evaluate(tiny, harvested, tmp_path, capsys):
    out = tmp_path / "sae"
    assert main(["train", str(harvested), str(out), *TRAINING, "--l", "2", "--score", "entropy"]) == 0
    assert {"checkpoint.pt", "metrics.jsonl", "config.json", "sae.safetensors", "run.json"} <= {
        p.name for p in out.iterdir()
    }
    capsys.readouterr()
    assert main(["evaluate", str(out), str(harvested), "--model", str(tiny[0]), "--splice-rows", "4"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert 0 < result["fvu"] < 1
    assert result["ce_clean"] <= result["ce_zero"] * 1.5
    assert "loss_recovered_zero" in capsys.readouterr().out
    assert main(["train", str(harvested), str(out), *TRAINING, "--l", "2", "--score", "entropy"]) == 0
    assert "Resumes at step 20" in capsys.readouterr().out


def test_a_training_ends_with_the_loss_recovered_where_the_model_is_at_hand(
    tiny, harvested, tmp_path, capsys, monkeypatch
):
    command = ["train", str(harvested), str(tmp_path / "sae"), *TRAINING]
    assert main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    result = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    assert f"loss recovered {result['loss_recovered_zero']:.4f}, SAE in {tmp_path / 'sae'}" in last
    assert main(["evaluate", str(tmp_path / "sae"), str(harvested), "--batch-size", "128", "--quiet"]) == 0
    assert json.loads((tmp_path / "sae" / "evaluation.json").read_text()) == result

    assert main([*command, "--splice-rows", "0"]) == 0
    assert "loss recovered not measured" in capsys.readouterr().out.splitlines()[-1]
    assert main([*command, "--splice-rows", "99"]) == 1
    assert "--splice-rows 99: must be from 0 to 10" in capsys.readouterr().err

    manifest = json.loads((harvested / "manifest.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(harvested, moved)
    (moved / "manifest.json").write_text(json.dumps({**manifest, "model": "no/such-model"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", str(moved), str(tmp_path / "other"), *TRAINING]) == 0
    assert "loss recovered not measured" in capsys.readouterr().out.splitlines()[-1]
    assert main(["train", str(moved), str(tmp_path / "asked"), *TRAINING, "--splice-rows", "2"]) == 1
    assert "no/such-model" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()


def test_another_model_in_its_place_is_no_reason_to_fail_a_run_that_is_done(harvested, other_model, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(harvested, moved)
    manifest = json.loads((harvested / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "model": str(other_model)}))
    command = ["train", str(moved), str(tmp_path / "sae"), *TRAINING]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "No loss recovered: " in said.err
    assert "FVU 0." in said.out.splitlines()[-1]
    assert "loss recovered not measured" in said.out.splitlines()[-1]
    assert main([*command, "--splice-rows", "2"]) == 1


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"),
]


def failing(error):
    def fails(*_, **__):
        raise error

    return fails


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_model_too_large_is_no_reason_to_fail_a_run_that_is_done(harvested, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setattr("sampled_sae.cli.identity.loaded_model", failing(error))
    command = ["train", str(harvested), str(tmp_path / "sae"), *TRAINING]
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"No loss recovered: not enough memory ({str(error) or 'no more was given'})" in said.err
    assert "loss recovered not measured" in said.out.splitlines()[-1]
    assert main([*command, "--splice-rows", "2"]) == 1


def test_what_is_no_lack_of_memory_stays_an_error():
    for error in (RuntimeError("shapes do not fit"), KeyError()):
        with pytest.raises(type(error)):
            tried(failing(error), asked=False)
    # among several ranks
    for error in (*NO_MEMORY, dist.DistError("out of memory"), RankError("rank 1: not enough memory")):
        with pytest.raises(type(error)):
            tried(failing(error), asked=False, alone=False)
    assert tried(failing(ValueError("no such model")), asked=False, alone=False) == (None, "no such model")


def test_sweep_writes_table_report_and_plots(tiny, harvested, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "sweep"
    command = ["sweep", str(harvested), str(out), *TRAINING, "--ls", "1,4,none", "--scores", "l2,uniform"]
    command += ["--model", str(tiny[0]), "--splice-rows", "3", "--together", "4", "--device", "cpu"]
    assert main(command) == 0
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["l1_l2", "l1_uniform", "l4_l2", "l4_uniform", "batchtopk", "topk"]
    assert all(float(row["fvu"]) > 0 and row["loss_recovered_zero"] for row in rows)
    report = (out / "report.md").read_text()
    held_out = json.loads((harvested / "manifest.json").read_text())["holdout"]["tokens"]
    assert f"evaluated on {held_out} held-out tokens" in report
    assert all(row["tokens"] == str(held_out) and row["predicted_tokens"] == "45" for row in rows)
    for name in ("quality.png", "training.png", "frequency.png"):
        assert f"![]({name})" in report
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert str(out / "report.md") in capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out.count("already evaluated") == 6


@pytest.fixture
def trained(harvested, tmp_path):
    assert main(["train", str(harvested), str(tmp_path / "sae"), *TRAINING, "--l", "2"]) == 0
    return tmp_path / "sae"


@pytest.fixture
def other_model(tiny, tmp_path):
    """The same architecture and tokenizer with other weights."""
    shutil.copytree(tiny[0], tmp_path / "other")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "other")
    model.model.embed_tokens.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_the_model_is_the_one_that_was_harvested(tiny, harvested, trained, other_model, tmp_path, capsys):
    command = ["evaluate", str(trained), str(harvested), "--splice-rows", "4", "--quiet"]
    assert main(command) == 0
    result = json.loads((trained / "evaluation.json").read_text())
    assert result["tokens"] > result["predicted_tokens"] == 4 * 15
    shutil.copytree(tiny[0], tmp_path / "copy")
    assert main([*command, "--model", str(tmp_path / "copy")]) == 0
    assert json.loads((trained / "evaluation.json").read_text()) == result, "its weights tell, not its name"
    capsys.readouterr()
    assert main([*command, "--model", str(other_model)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"layer 1 of {tiny[0]} (weights " in line
    assert f"--model {other_model} gives layer 1 of {other_model} (weights " in line
    assert json.loads((trained / "evaluation.json").read_text()) == result
    assert main([*command, "--model", str(other_model), "--insist"]) == 0
    assert json.loads((trained / "evaluation.json").read_text())["ce_clean"] != result["ce_clean"]


def test_a_sweep_takes_the_harvested_model(tiny, harvested, other_model, tmp_path, capsys):
    out = tmp_path / "sweep"
    command = ["sweep", str(harvested), str(out), *TRAINING, "--ls", "2", "--scores", "l2", "--no-topk"]
    command += ["--splice-rows", "3"]
    assert main([*command, "--model", str(other_model)]) == 1
    assert f"--model {other_model} gives layer 1" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    assert main([*command, "--model", str(other_model), "--insist"]) == 1
    line = capsys.readouterr().err
    assert f"(splice: model): model was '{tiny[0]}', is '{other_model}'" in line


def test_a_damaged_shard_is_found_and_repaired_by_the_same_harvest(tiny, harvested, tmp_path, capsys):
    acts = shutil.copytree(harvested, tmp_path / "acts")
    command = ["harvest", str(acts), "--model", str(tiny[0]), "--layer", "1", "--texts", str(tiny[1])]
    command += ["--context", "16", "--holdout-rows", "10", "--quiet"]
    before = {path.name: path.read_bytes() for path in acts.iterdir()}
    for name in ("shard_00000.safetensors", "holdout.safetensors"):
        raw = bytearray(before[name])
        raw[-9] ^= 4
        (acts / name).write_bytes(raw)
        assert main(["verify", str(acts)]) == 1
        assert f"{acts / name}: corrupt, checksum " in capsys.readouterr().out
        if name.startswith("shard"):
            assert main(["train", str(acts), str(tmp_path / "sae"), *TRAINING]) == 1
            assert "the same harvest command writes it again" in capsys.readouterr().err
        assert main(command) == 0
        assert main(["verify", str(acts)]) == 0
        assert {path.name: path.read_bytes() for path in acts.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{missing}", "{out}"], "manifest.json: no such file"),
        (["train", "{store}", "{out}", "--k", "0"], "--k 0.0: must be in (0, 8192]"),
        (["train", "{store}", "{out}", "--l", "0.5"], "--l 0.5: must be a finite number >= 1"),
        (
            ["train", "{store}", "{out}", "--score", "entropy"],
            "--score 'entropy': is of a pool, and without l there is none",
        ),
        (["train", "{store}", "{out}", "--l", "none", "--pool-every", "4"], "--pool-every 4: is of a pool"),
        (["train", "{store}", "{out}", "--steps", "0"], "--steps 0: must"),
        (["train", "{store}", "{out}", "--device", "gpu"], "--device 'gpu': must be 'cpu', 'cuda' or 'cuda:N'"),
        (["sweep", "{store}", "{out}", "--splice-rows", "0", "--together", "0"], "--together 0: must be"),
        (["evaluate", "{missing}", "{store}"], "config.json: no such file"),
    ],
)
def test_errors_say_what_is_wrong_and_exit_with_1(harvested, tmp_path, capsys, arguments, message):
    places = {"missing": tmp_path / "missing", "store": harvested, "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    assert message in capsys.readouterr().err


def test_every_option_has_help():
    commands = build_parser()._subparsers._group_actions[0].choices
    names = "harvest train evaluate sweep encode look export import compare verify check bench"
    assert set(commands) == set(names.split())
    for sub in commands.values():
        assert all(action.help for action in sub._actions)
