"""A training replaces no SAE but that of its own run, and no files of others."""

import json
from dataclasses import replace

import pytest
import torch
from makers import D, contents, tokens

from sampled_sae import ActivationStore, SAEGroup, SampledSAE, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae.cli import main
from sampled_sae.training.checkpoint import CHECKPOINT

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=4, batch_size=64, checkpoint_every=2, log_every=2)


@pytest.fixture
def store(tmp_path):
    x = tokens(300, D, dtype=torch.float32) + 0.3
    return ActivationStore.write(tmp_path / "store", x, holdout=50, shard_tokens=100, source="made")


def finished(store, folder):
    """As a sweep leaves it, or somebody who wants the room."""
    Trainer(SAE, TRAIN, store, folder).run(progress=False)
    (folder / CHECKPOINT).unlink()
    return contents(folder)


@pytest.mark.parametrize(
    ("sae", "train"),
    [(replace(SAE, k=2), TRAIN), (replace(SAE, seed=1), TRAIN), (SAE, replace(TRAIN, lr=0.5)), (SAE, None)],
    ids=["k", "seed", "lr", "store"],
)
def test_an_sae_of_another_training_stays(store, tmp_path, sae, train):
    before = finished(store, tmp_path / "run")
    if train is None:
        store = ActivationStore.write(tmp_path / "other", tokens(300, D, dtype=torch.float32, seed=5), source="made")
    with pytest.raises(
        ValueError, match=r"run: holds an SAE that is not of this training, and no checkpoint; .* folder"
    ):
        Trainer(sae, train or TRAIN, store, tmp_path / "run")
    with pytest.raises(ValueError, match=r"configs\['run'\]: .* not of this training"):
        SAEGroup({"run": sae}, train or TRAIN, store, tmp_path)
    assert contents(tmp_path / "run") == before


def test_the_same_training_may_be_done_again(store, tmp_path):
    before = finished(store, tmp_path / "run")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert {**before, CHECKPOINT: b""} == {**contents(tmp_path / "run"), CHECKPOINT: b""}
    (tmp_path / "run" / CHECKPOINT).unlink()
    assert Trainer(replace(SAE, screen="off"), TRAIN, store, tmp_path / "run").step == 0


@pytest.mark.parametrize("saved", ["by hand", "imported"])
def test_an_sae_without_a_record_stays(store, tmp_path, capsys, saved):
    if saved == "by hand":
        SampledSAE(SAE).save_pretrained(tmp_path / "run")
    else:
        formats.export(SampledSAE(SAE), tmp_path / "theirs", to="saelens")
        assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "run")]) == 0
    before = contents(tmp_path / "run")
    options = ["--features", "48", "--k", "3", "--steps", "4", "--batch-size", "64"]
    assert main(["train", str(store.folder), str(tmp_path / "run"), *options]) == 1
    assert "not of this training" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning"])
def test_files_of_others_stay(store, tmp_path, to):
    formats.export(SampledSAE(SAE), tmp_path / "run", to=to, inference="topk")
    before = contents(tmp_path / "run")
    for write in (
        lambda: Trainer(SAE, TRAIN, store, tmp_path / "run"),
        lambda: SampledSAE(SAE).save_pretrained(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match="is of something else than a SampledSAE and would be replaced"):
            write()
    assert contents(tmp_path / "run") == before


def test_a_training_that_finished_meanwhile_is_not_done_again_over_it(store, tmp_path):
    late = Trainer(replace(SAE, seed=1), TRAIN, store, tmp_path / "run")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    before = contents(tmp_path / "run")
    with pytest.raises(BlockingIOError, match="run: another training has written there meanwhile; start again"):
        late.run(progress=False)
    assert contents(tmp_path / "run") == before


def test_one_object_may_run_twice(store, tmp_path):
    trainer = Trainer(SAE, TRAIN, store, tmp_path / "run")
    trainer.run(progress=False)
    before = contents(tmp_path / "run")
    trainer.run(progress=False)
    assert json.loads(before["run.json"]) == json.loads(contents(tmp_path / "run")["run.json"])
