"""From a language model to an evaluated SAE by the commands of two processes: files and figures are those of one."""

import json

import pytest
from launching import COMMON, Mishap, files, launch
from safetensors.torch import load_file
from word_models import save_word_llama

from sampled_sae.cli import main

WORDS = [f"w{i}" for i in range(40)]
MODEL = "sampled_sae.cli.identity:loaded_model"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and texts."""
    folder = tmp_path_factory.mktemp("real")
    save_word_llama(folder / "model", WORDS, hidden_size=16, initializer_range=0.3)
    lines = (" ".join(WORDS[(i * j + i) % 40] for j in range(9)) for i in range(80))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def harvested(place):
    """Activations, by two processes and by one."""
    argv = ["--model", place / "model", "--texts", place / "texts.jsonl", "--layer", "0", "--context", "16", "--quiet"]
    argv += ["--holdout-rows", "7"]
    assert launch(place, 2, ["harvest", place / "two", *argv]) == ([0, 0], ["", ""])
    assert main([str(part) for part in ("harvest", place / "one", *argv)]) == 0
    return place / "two", place / "one"


@pytest.fixture(scope="module")
def trained(place, harvested):
    argv = ["train", harvested[0], place / "run", *COMMON, "--l", "4"]
    assert launch(place, 2, argv) == ([0, 0], ["", ""])
    return place / "run", argv


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = value is None or isinstance(value, str)
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-6)), name


def test_two_processes_harvest_train_and_evaluate_as_one_does(harvested, trained, tmp_path):
    two, one = harvested
    assert files(two) == files(one)
    run, argv = trained
    assert main([str(part) for part in ("train", one, tmp_path / "run", *argv[3:], "--lanes", "2")]) == 0
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, tmp_path / "run"))
    assert found["predicted_tokens"] == 7 * 15
    same(found, expected)
    # evaluated again, the figures of one process on the very same SAE
    command = ["evaluate", str(run), str(two), "--batch-size", "64", "--splice-rows", "5", "--quiet"]
    assert main(command) == 0
    expected = json.loads((run / "evaluation.json").read_text())
    for shards in (1, 2):
        assert launch(tmp_path, 2, [*command, "--feature-shards", shards])[0] == [0, 0]
        same(json.loads((run / "evaluation.json").read_text()), expected)
    assert expected["predicted_tokens"] == 5 * 15


def test_a_model_that_one_rank_lacks_is_used_by_none(trained, tmp_path):
    run, argv = trained
    argv = [*argv[:2], tmp_path / "run", *(part for part in argv[3:] if part != "--quiet")]
    codes, outputs = launch(tmp_path, 2, argv, Mishap(1, MODEL, "its disk is gone"))
    assert codes == [0, 0]
    assert "No loss recovered: rank 1: its disk is gone\n" in outputs[0]
    assert outputs[1] == ""
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "loss_recovered_zero" not in found
    expected, ours = (load_file(folder / "sae.safetensors") for folder in (run, tmp_path / "run"))
    assert all((ours[name] == t).all() for name, t in expected.items())
