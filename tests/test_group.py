"""Several SAEs on one stream: each equals the SAE that a Trainer of its own makes."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE as SAE
from makers import same_weights, write_store

from sampled_sae import SAEGroup
from sampled_sae.support import late_values
from sampled_sae.training import sweep
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.checkpoint import CHECKPOINT
from sampled_sae.training.sweep import run_sweep
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.trainer import Trainer
from sampled_sae.training.training_run import METRICS

TRAIN = TrainConfig(steps=24, batch_size=64, checkpoint_every=6, log_every=2, lr=3e-3, seed=7)
CONFIGS = {
    "l2": SAE,
    "drawn": replace(SAE, pool="sample", score="entropy", seed=1),
    "topk": replace(SAE, l=None, select="token", d_sae=64, seed=2),
    "specification": replace(SAE, l=None, impl="reference"),
}
# Overflows at the first step with dead features: 64 tokens a step, dead after 300.
OVERFLOWS = replace(SAE, aux_coefficient=3e38)
FILES = (METRICS, "config.json", "sae.safetensors", "run.json")


@pytest.fixture
def other_store(tmp_path):
    """Another layer of other width."""
    return ActivationStore.open(write_store(tmp_path / "other", d=8, seed=6, layer=1))


@pytest.fixture
def fetched(monkeypatch):
    """(folder of the store, batch number) -> how often it was fetched."""
    counts = Counter()
    whole = ShuffledStream.batch

    def batch(self, t):
        counts[self.store.folder.name, t] += 1
        return whole(self, t)

    monkeypatch.setattr(ShuffledStream, "batch", batch)
    return counts


class Killed(Exception):
    pass


def kill(group, name, method, step):
    """Runs the group in a process that dies as `name` starts `method` at `step`."""
    member = group.members[name]
    whole = getattr(member, method)

    def dies(*arguments):
        if member.step == step:
            raise Killed
        return whole(*arguments)

    setattr(member, method, dies)
    with pytest.raises(Killed):
        group.run(progress=False)


def assert_equal_to_trainers(saes, configs, stores, folder, alone):
    """The weights and every file but the checkpoint, whose `seconds` differ."""
    for name, config in configs.items():
        sae = Trainer(config, TRAIN, stores[name], alone / name).run(progress=False)
        assert same_weights(saes[name], sae), name
        assert not saes[name].training
        assert {file.name for file in (folder / name).iterdir()} == {CHECKPOINT, *FILES}
        for file in FILES:
            assert (folder / name / file).read_bytes() == (alone / name / file).read_bytes(), (name, file)


def test_members_equal_single_trainers_bit_for_bit(store, tmp_path):
    saes = SAEGroup(CONFIGS, TRAIN, store, tmp_path / "group").run(progress=False)
    assert list(saes) == list(CONFIGS)
    stores = dict.fromkeys(CONFIGS, store)
    assert_equal_to_trainers(saes, CONFIGS, stores, tmp_path / "group", tmp_path / "alone")


def test_each_member_may_have_a_store_of_its_own(store, other_store, tmp_path, fetched):
    configs = {"a": SAE, "b": replace(SAE, d_in=8), "c": replace(SAE, l=None), "d": replace(SAE, d_in=8, seed=3)}
    again = ActivationStore.open(other_store.folder)
    stores = {"a": store, "b": other_store, "c": store, "d": again}
    group = SAEGroup(configs, TRAIN, stores, tmp_path / "group")
    saes = group.run(progress=False)
    calibration = range(-(-600 // TRAIN.batch_size))
    once = Counter((folder, t) for folder in ("activations", "other") for t in range(TRAIN.steps))
    once.update((folder, t) for folder in ("activations", "other") for t in calibration)
    assert fetched == once, "one fetch a step and store, then the calibration's"
    assert_equal_to_trainers(saes, configs, stores, tmp_path / "group", tmp_path / "alone")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("method", "at", "left"),
    [
        ("save", 6, (6, 0, 0, 0)),
        ("save", 18, (18, 12, 12, 12)),
        ("save", 24, (24, 18, 18, 18)),
        ("finish", 24, (24, 24, 24, 24)),
        ("train_on", 15, (12, 12, 12, 12)),
    ],
)
def test_a_group_killed_between_two_members_goes_on_from_the_smallest_step(store, tmp_path, fetched, method, at, left):
    kill(SAEGroup(CONFIGS, TRAIN, store, tmp_path / "group"), "drawn", method, at)
    resumed = SAEGroup(CONFIGS, TRAIN, store, tmp_path / "group")
    assert tuple(member.step for member in resumed.members.values()) == left
    assert resumed.step == min(left)
    spent = resumed.members["l2"].seconds
    assert spent > 0, "what was spent before the kill counts"
    fetched.clear()
    saes = resumed.run(progress=False)
    assert resumed.members["l2"].seconds >= spent
    steps = [t for _, t in fetched if t >= -(-600 // TRAIN.batch_size)]
    assert steps == list(range(max(min(left), 10), TRAIN.steps))
    stores = dict.fromkeys(CONFIGS, store)
    assert_equal_to_trainers(saes, CONFIGS, stores, tmp_path / "group", tmp_path / "alone")


def test_a_trainer_s_folder_goes_on_in_a_group_and_back(store, tmp_path):
    kill(SAEGroup({"a": SAE}, TRAIN, store, tmp_path), "a", "train_on", 8)
    trainer = Trainer(SAE, TRAIN, store, tmp_path / "a")
    assert trainer.step == 6
    sae = trainer.run(progress=False)
    finished = SAEGroup({"a": SAE, "b": replace(SAE, seed=1)}, TRAIN, store, tmp_path)
    assert finished.members["a"].step == TRAIN.steps
    assert same_weights(finished.run(progress=False)["a"], sae)


def test_a_loss_that_is_not_finite_names_member_and_step_and_nothing_saved_is_lost(store, tmp_path):
    configs = {"good": SAE, "bad": OVERFLOWS, "late": replace(SAE, seed=1)}
    train = replace(TRAIN, checkpoint_every=2)
    group = SAEGroup(configs, train, store, tmp_path)
    with pytest.raises(FloatingPointError, match=r"^bad: loss=inf at step 5; the last checkpoint in \S+bad is intact"):
        group.run(progress=False)
    again = SAEGroup(configs, train, store, tmp_path)
    assert [member.step for member in again.members.values()] == [6, 4, 4]
    del configs["bad"]
    saes = SAEGroup(configs, train, store, tmp_path).run(progress=False)
    assert same_weights(saes["late"], Trainer(configs["late"], train, store, tmp_path / "x").run(progress=False))


def test_a_single_trainer_s_loss_that_is_not_finite(store, tmp_path):
    with pytest.raises(FloatingPointError, match=r"^loss=inf at step 5; the last checkpoint in \S+ is intact$"):
        Trainer(OVERFLOWS, TRAIN, store, tmp_path).run(progress=False)


class Late:
    """The event of a GPU that is behind."""

    def query(self):
        return False

    def synchronize(self):
        pass


@pytest.mark.parametrize(("every", "step"), [(1, 6), (100, 6)], ids=["checkpoint", "next step"])
def test_a_loss_of_a_gpu_is_looked_at_later_but_before_anything_is_saved(store, tmp_path, monkeypatch, every, step):
    """Losses arrive late, as from a GPU: the step that was at fault is named, and no checkpoint holds its weights."""
    monkeypatch.setattr(
        late_values.LateScalars, "put", lambda self, number, loss: self._pending.append((number, loss.detach(), Late()))
    )
    trainer = Trainer(OVERFLOWS, replace(TRAIN, checkpoint_every=every, log_every=100), store, tmp_path)
    with pytest.raises(FloatingPointError, match=r"^loss=inf at step 5; the last checkpoint in \S+ is intact$"):
        trainer.run(progress=False)
    assert trainer.step == step
    if every == 1:
        assert Trainer(OVERFLOWS, trainer.config, store, tmp_path).step == 5
    else:
        assert not (tmp_path / CHECKPOINT).exists()


def test_sweep_gives_the_same_table_however_many_are_trained_together(store, tmp_path):
    configs = {name: config for name, config in CONFIGS.items() if name != "specification"}
    configs |= {"reseeded": replace(SAE, seed=5)}
    tables, rows = {}, {}
    for together in (1, 3):
        folder = tmp_path / str(together)
        rows[together] = run_sweep(configs, TRAIN, store, folder, progress=False, together=together)
        tables[together] = [line.split("|")[:-2] for line in (folder / "results.md").read_text().splitlines()]
        assert not list(folder.glob(f"*/{CHECKPOINT}"))
        assert all(row.pop("seconds") >= 0 for row in rows[together])
    assert rows[1] == rows[3]
    assert tables[1] == tables[3]
    assert [row["name"] for row in rows[3]] == list(configs)
    trainer = Trainer(configs["reseeded"], TRAIN, store, tmp_path / "alone")
    trainer.run(progress=False)
    written = [(tmp_path / folder / METRICS).read_bytes() for folder in ("3/reseeded", "alone")]
    assert written[0] == written[1], "the order of the tokens is that of train.seed, whatever the config's seed"


def test_sweep_resumed_within_a_group_does_not_redo_what_is_evaluated(store, tmp_path, monkeypatch):
    whole, calls = sweep.evaluate, []

    def evaluate(sae, *arguments):
        calls.append(sae)
        if len(calls) == 2:
            raise Killed
        return whole(sae, *arguments)

    monkeypatch.setattr(sweep, "evaluate", evaluate)
    with pytest.raises(Killed):
        run_sweep(CONFIGS, TRAIN, store, tmp_path / "s", progress=False, together=2)
    said = []
    rows = run_sweep(CONFIGS, TRAIN, store, tmp_path / "s", progress=False, together=3, say=said.append)
    assert len(calls) == 2 + 3
    assert [line for line in said if "already" in line] == ["[1/4] l2: already evaluated"]
    monkeypatch.setattr(sweep, "evaluate", whole)
    uninterrupted = run_sweep(CONFIGS, TRAIN, store, tmp_path / "whole", progress=False)
    for row, expected in zip(rows, uninterrupted):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize(
    ("configs", "stores", "message"),
    [
        ({}, "store", r"configs=\{\}: must name at least one"),
        ({"a": SAE, "b": replace(SAE, d_in=8)}, "store", r"configs\['b'\]: d_in=8: the activations in \S+ have 12"),
        ({"a": SAE, "../b": SAE}, "store", r"configs\['../b'\]: the name must be that of a folder"),
        ({"": SAE}, "store", r"configs\[''\]: the name must be"),
        (
            {"a": SAE, "b": SAE},
            ("a", "c"),
            r"stores=\['a', 'c'\]: .* \['a', 'b'\]; missing \['b'\], unknown \['c'\]",
        ),
    ],
)
def test_errors_of_the_constructor(store, tmp_path, configs, stores, message):
    given = store if stores == "store" else dict.fromkeys(stores, store)
    with pytest.raises(ValueError, match=message):
        SAEGroup(configs, TRAIN, given, tmp_path / "group")
    assert not (tmp_path / "group").exists()


def test_batch_size_above_the_store_names_the_member(store, tmp_path):
    with pytest.raises(ValueError, match=r"configs\['a'\]: batch_size=501: must be at most 500"):
        SAEGroup({"a": SAE}, replace(TRAIN, batch_size=501), store, tmp_path)


def test_a_checkpoint_of_another_layer_is_refused(store, tmp_path):
    other = ActivationStore.open(write_store(tmp_path / "layer9", layer=9))
    assert other.manifest["shards"] == store.manifest["shards"]
    SAEGroup({"a": SAE}, TRAIN, store, tmp_path).run(progress=False)
    with pytest.raises(ValueError, match=r"configs\['a'\]: .*other settings \(activations: layer\)"):
        SAEGroup({"a": SAE}, TRAIN, other, tmp_path)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(store, tmp_path, device):
    with pytest.raises(ValueError, match=f"device='{device}': "):
        Trainer(SAE, TRAIN, store, tmp_path, device)
    with pytest.raises(ValueError, match=f"device='{device}': "):
        SAEGroup({"a": SAE}, TRAIN, store, tmp_path, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_members_on_a_gpu(store, tmp_path):
    configs = {"a": replace(SAE, impl="torch"), "b": replace(SAE, impl="torch", l=None)}
    kill(SAEGroup(configs, TRAIN, store, tmp_path, "cuda"), "b", "save", 12)
    group = SAEGroup(configs, TRAIN, store, tmp_path, "cuda")
    assert group.step == 6
    assert all(sae.W_enc.is_cuda for sae in group.run(progress=False).values())
    rows = run_sweep(configs, TRAIN, store, tmp_path / "sweep", progress=False, device="cuda")
    assert all(math.isfinite(row["fvu"]) for row in rows)


@pytest.mark.parametrize("name", ["a:b", "a?", "con", "NUL.json", "a.", "a ", "a\\b", "COM1", "a\nb"])
def test_names_that_are_no_folder_s_on_some_system(store, tmp_path, name):
    with pytest.raises(ValueError, match="the name must be that of a folder"):
        SAEGroup({name: SAE}, TRAIN, store, tmp_path)


def test_names_that_are_one_folder_on_some_systems(store, tmp_path):
    with pytest.raises(ValueError, match=r"configs=\['A', 'a', 'b'\]: names must differ by more than case"):
        SAEGroup(dict.fromkeys(("a", "b", "A"), SAE), TRAIN, store, tmp_path)
