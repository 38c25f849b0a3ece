"""`torchrun -m sampled_sae train`, `evaluate` and `sweep`: what one process does, and one sentence where it fails."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import COMMON, OPTIONS, Mishap, files, launch
from makers import write_store
from safetensors.torch import load_file, save_file

from sampled_sae.cli import main
from sampled_sae.cli.closing import of_all

BATCH = "sampled_sae.training.batches:ShuffledStream.batch"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("commands") / "store")


@pytest.fixture(scope="module")
def two(store, tmp_path_factory):
    """The folder of a run by two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    said = launch(folder, 2, ["train", store, folder / "run", *OPTIONS[:-1]])
    return folder / "run", said


def weights(folder):
    return load_file(folder / "sae.safetensors")


def assert_close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_what_one_does(store, two, tmp_path):
    folder, (codes, (first, second)) = two
    assert codes == [0, 0]
    assert "2 processes over gloo: the tokens of a batch in 2 parts, each has all features" in first
    assert "done: threshold" in first
    assert second == ""
    assert main(["train", str(store), str(tmp_path / "one"), *OPTIONS, "--lanes", "2"]) == 0
    assert_close(weights(folder), weights(tmp_path / "one"))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (folder, tmp_path / "one")]
    assert [line["step"] for line in lines[0]] == [2, 4, 6, 8]
    for ours, theirs in zip(*lines):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert files(folder)["config.json"] == files(tmp_path / "one")["config.json"]
    assert main(["verify", str(folder)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shards", "slurm"), [(2, 2, False), (4, 2, True), (3, 1, False), (3, 3, False)])
def test_every_layout_trains_what_one_process_does(store, tmp_path, size, shards, slurm):
    argv = ["train", store, tmp_path / "run", *OPTIONS, "--feature-shards", shards]
    assert launch(tmp_path, size, argv, slurm=slurm)[0] == [0] * size
    assert main(["train", str(store), str(tmp_path / "one"), *OPTIONS, "--lanes", str(size)]) == 0
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_evaluate_and_sweep_give_what_one_process_does(store, tmp_path, shards):
    argv = ["sweep", store, tmp_path / "two", *COMMON, "--ls", "2,none", "--scores", "l2", "--splice-rows", "0"]
    assert launch(tmp_path, 2, [*argv, "--feature-shards", shards])[0] == [0, 0]
    rows = json.loads((tmp_path / "two" / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["l2_l2", "batchtopk", "topk"]
    assert {path.name for path in (tmp_path / "two" / "topk").iterdir()} == {
        "config.json", "evaluation.json", "metrics.jsonl", "result.json", "run.json", "sae.safetensors"
    }  # fmt: skip
    folder = tmp_path / "two" / "l2_l2"
    spread = json.loads((folder / "evaluation.json").read_text())
    command = ["evaluate", str(folder), str(store), "--batch-size", "64", "--splice-rows", "0", "--quiet"]
    assert main(command) == 0
    alone = json.loads((folder / "evaluation.json").read_text())
    assert launch(tmp_path, 2, [*command, "--feature-shards", shards])[0] == [0, 0]
    for found in (spread, json.loads((folder / "evaluation.json").read_text())):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


@pytest.mark.parametrize(
    ("found", "reasons", "said"),
    [
        ("ours", [None, None], None),
        ("ours", [None, ""], "rank 1: the model that was harvested is not on its machine"),
        (None, ["no weights", None], "rank 0: no weights"),
        (None, ["no weights", "no weights"], "no weights"),
        (None, ["", ""], None),
    ],
)
def test_a_model_that_some_ranks_lack_is_used_by_none(found, reasons, said, capsys):
    ranks = SimpleNamespace(size=2, gather=lambda reason: reasons)
    assert of_all(found, "", ranks) == (found if reasons == [None, None] else None)
    assert capsys.readouterr().err == ("" if said is None else f"No loss recovered: {said}\n")


def test_an_error_on_one_rank_is_one_sentence_that_names_it(store, tmp_path):
    mishap = Mishap(1, BATCH, "the disk is on fire", call=4)
    codes, outputs = launch(tmp_path, 2, ["train", store, tmp_path / "run", *OPTIONS], mishap)
    assert codes == [1, 1]
    assert outputs == ["", "sampled-sae train: rank 1: the disk is on fire\n"]
    assert (tmp_path / "run" / "checkpoint_00000003").is_dir()


def test_nan_that_one_rank_reads_stops_all_with_rank_and_step(tmp_path):
    store = write_store(tmp_path / "store")
    shard = store / "shard_00001.safetensors"
    x = load_file(shard)["activations"]
    x[77, 3] = float("nan")
    save_file({"activations": x}, shard)
    codes, outputs = launch(tmp_path, 2, ["train", store, tmp_path / "run", *OPTIONS])
    assert codes == [1, 1]
    (said,) = filter(None, outputs)
    rank = outputs.index(said)
    assert re.match(rf"sampled-sae train: rank {rank}: activations at step \d: 1 of 384 values are NaN or inf", said)


@pytest.mark.parametrize(
    ("argv", "size", "status", "said"),
    [
        (["train", "{store}", "{new}", *OPTIONS, "--k", "-1"], 2, 1, "--k -1.0: must be in (0, 96]"),
        (["train", "{new}", "{new}", *OPTIONS], 2, 1, "manifest.json: no such file"),
        (["train", "{store}", "{new}", "--step", "3"], 2, 2, "did you mean --steps?"),
        (["train", "{store}", "{new}", *OPTIONS, "--feature-shards", "2"], 3, 1, "--feature-shards 2: must divide"),
        (["verify", "{store}"], 2, 1, "verify is for one process; start it without torchrun"),
    ],
    ids=["value", "file", "option", "shards", "command"],
)
def test_what_is_wrong_for_all_is_said_once(store, tmp_path, argv, size, status, said):
    argv = [part.format(store=store, new=tmp_path / "new") for part in argv]
    codes, outputs = launch(tmp_path, size, argv)
    assert codes == [status] * size
    assert said in outputs[0]
    assert outputs[0].count("\n") == 1
    assert "rank" not in outputs[0]
    assert outputs[1:] == [""] * (size - 1)
    assert not (tmp_path / "new").exists()


def test_feature_shards_need_processes(store, tmp_path, capsys):
    assert main(["train", str(store), str(tmp_path / "new"), "--feature-shards", "2"]) == 1
    assert "--feature-shards 2: needs as many processes: torchrun --nproc-per-node 2" in capsys.readouterr().err


KINDS = {
    "transcoder": ["{store}", "--targets", "{targets}", "--skip", "--l", "none"],
    "fixed set": ["{store}", "--inference", "pool", "--inference-pool", "24", "--screen", "bf16"],
    "own tensor": [
        "{npy}",
        "--holdout",
        "100",
        "--k-start",
        "6",
        "--l-start",
        "20",
        "--schedule-steps",
        "5",
    ],
    "started": ["{store}", "--init-from", "{sae}", "--groups", "16,40"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shards"), [("transcoder", 2), ("fixed set", 2), ("own tensor", 1), ("started", 1)])
def test_every_kind_of_sae_trains_as_by_one_process(store, two, tmp_path, kind, shards):
    write_store(tmp_path / "targets", seed=6)
    np.save(tmp_path / "x.npy", torch.cat([load_file(p)["activations"] for p in sorted(store.glob("shard*"))]).numpy())
    places = {"store": store, "targets": tmp_path / "targets", "npy": tmp_path / "x.npy", "sae": two[0]}
    what, *options = (part.format(**places) for part in KINDS[kind])
    argv = ["train", what, tmp_path / "run", *OPTIONS, *options, "--feature-shards", shards]
    codes, outputs = launch(tmp_path, 2, argv)
    assert codes == [0, 0], outputs
    assert main(["train", what, str(tmp_path / "one"), *OPTIONS, *options, "--lanes", "2"]) == 0
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "one"))
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "one")]
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        same = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-3)
        assert found[0][name] == same, name
