import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from forked import run_forked
from makers import SMALL_SAE as SAE
from makers import D, begun_training, same_weights, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae.cli import main
from sampled_sae.support.atomic_files import write_json
from sampled_sae.training.activation_store import ActivationStore
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.checkpoint import CHECKPOINT
from sampled_sae.training.train_config import TrainConfig
from sampled_sae.training.trainer import Trainer
from sampled_sae.training.training_run import METRICS

TRAIN = TrainConfig(steps=24, batch_size=64, checkpoint_every=6, log_every=2, lr=3e-3)


class Killed(Exception):
    pass


def train_killed_at(step, store, folder, config=SAE, train=TRAIN):
    """Trains as a process would that dies right before `step`."""
    trainer = Trainer(config, train, store, folder)
    whole = trainer.stream.batch

    def batch(t):
        if t == step:
            raise Killed
        return whole(t)

    trainer.stream.batch = batch
    with pytest.raises(Killed):
        trainer.run(progress=False)


def test_stream_visits_every_token_once_an_epoch(store):
    stream = ShuffledStream(store, 50, seed=1)
    assert stream.batches_per_epoch(0) == 10
    epoch = torch.cat([stream.batch(t) for t in range(10)])
    everything = torch.cat([store.shard(i) for i in range(3)]) * store.scale
    assert torch.equal(epoch.sort(0).values, everything.sort(0).values)
    assert not torch.equal(epoch, everything)
    assert not torch.equal(stream.batch(10), stream.batch(0)), "the second epoch has another order"


def test_stream_is_addressed_by_batch_number(store, monkeypatch):
    monkeypatch.setattr("sampled_sae.training.batches.GROUP_BYTES", 4 * D * 250)
    one, other = (ShuffledStream(store, 30, seed=2) for _ in range(2))
    assert len(one._plan(0)[0]) > 1, "the test needs several groups"
    forward = [one.batch(t) for t in range(25)]
    for t in reversed(range(25)):
        assert torch.equal(other.batch(t), forward[t])
    assert not torch.equal(ShuffledStream(store, 30, seed=3).batch(0), forward[0])


@pytest.mark.parametrize(
    ("config", "train"),
    [
        (SAE, TRAIN),
        (replace(SAE, l=None), TRAIN),
        (replace(SAE, l=None, select="token"), replace(TRAIN, seed=4)),
        (replace(SAE, pool="sample", score="entropy"), TRAIN),
        (replace(SAE, pool="sample", pool_every=5), replace(TRAIN, adam="decayed", moments="bfloat16")),
        (replace(SAE, screen="bf16"), TRAIN),
        (replace(SAE, screen="bf16", l=None), TRAIN),
        (replace(SAE, screen="bf16", l=None, select="token"), TRAIN),
    ],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(store, tmp_path, config, train):
    whole = Trainer(config, train, store, tmp_path / "whole").run(progress=False)
    train_killed_at(15, store, tmp_path / "killed", config, train)
    resumed = Trainer(config, train, store, tmp_path / "killed")
    assert resumed.step == 12, "at most the steps since the last checkpoint are lost"
    assert same_weights(resumed.run(progress=False), whole)
    assert (tmp_path / "killed" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


@pytest.mark.parametrize("k", [3, 8, 9])
def test_a_resumed_run_searches_from_the_same_threshold(tmp_path, k):
    """A token whose threshold was too high is multiplied once more alone, which may round otherwise."""
    x = torch.randn(3000, 12, generator=torch.Generator().manual_seed(0))
    config, train = replace(SAE, d_sae=96, k=k, l=None, select="token"), replace(TRAIN, batch_size=32, lr=3e-3)
    whole = begun_training(config, train, x, tmp_path, steps=1)
    resumed = Trainer(config, train, x, tmp_path)
    assert resumed.sae.memory.hints.state_dict() == whole.sae.memory.hints.state_dict() != []
    for run in (whole, resumed):
        run.train_on(run.feed.batch(1))
    assert same_weights(resumed.sae, whole.sae)


def test_a_checkpoint_without_thresholds_of_searches_goes_on(store, tmp_path):
    """As earlier versions wrote it."""
    begun_training(replace(SAE, l=None), TRAIN, store, tmp_path, steps=1)
    state = torch.load(tmp_path / CHECKPOINT)
    del state["hints"]
    torch.save(state, tmp_path / CHECKPOINT)
    assert Trainer(replace(SAE, l=None), TRAIN, store, tmp_path).step == 1


def test_a_run_goes_on_with_another_screen(store, tmp_path):
    train_killed_at(15, store, tmp_path, replace(SAE, screen="off"), TRAIN)
    resumed = Trainer(replace(SAE, screen="bf16"), TRAIN, store, tmp_path)
    assert resumed.step == 12
    assert resumed.run(progress=False).cfg.screen == "bf16"


def test_training_lowers_fvu_and_saves_a_loadable_sae(store, tmp_path):
    sae = Trainer(SAE, replace(TRAIN, steps=300, lr=1e-2), store, tmp_path / "run").run(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.5 * lines[0]["fvu"]
    assert {"step", "loss", "l0", "fvu", "dead_share"} <= set(lines[-1])
    assert lines[-1]["step"] == 300
    loaded = SampledSAE.from_pretrained(tmp_path / "run")
    assert loaded.cfg == replace(SAE, input_scale=store.scale)
    x = store.holdout()[0]
    assert torch.equal(loaded.encode(x), sae.encode(x))
    norms = torch.linalg.vector_norm(loaded.W_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    loaded.train()(x).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters()), "any optimizer can train it on"


def test_learning_rate_rises_holds_and_falls():
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1, decay=0.2)
    assert [config.lr_at(s) for s in (0, 4, 9, 50, 80)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert config.lr_at(99) == pytest.approx(0.05)


def test_checkpoint_of_other_settings_is_refused(store, tmp_path):
    train_killed_at(8, store, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(train: lr\)"):
        Trainer(SAE, replace(TRAIN, lr=1.0), store, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(sae: k\)"):
        Trainer(replace(SAE, k=2), TRAIN, store, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_truncated_or_foreign_checkpoint_is_refused(store, tmp_path, content):
    train_killed_at(8, store, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: truncated or not a checkpoint"):
        Trainer(SAE, TRAIN, store, tmp_path)


def test_nan_in_the_activations_is_reported_with_the_step_and_nothing_is_lost(store, tmp_path):
    train_killed_at(10, store, tmp_path / "run")
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    trainer = Trainer(SAE, TRAIN, store, tmp_path / "run")
    trainer.stream._group(0, 0, 0)[6 * 64 + 3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"activations at step 6: 1 of 768 values are NaN or inf, .* \(3, 5\)"):
        trainer.run(progress=False)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "bits", "shape", "unfinished", "foreign"])
def test_damaged_activations_name_the_file(tmp_path, damage):
    folder = write_store(tmp_path / "a", **({"complete": False} if damage == "unfinished" else {}))
    shard = folder / "shard_00001.safetensors"
    raw = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(raw[:-100])
    elif damage == "bits":
        shard.write_bytes(b"\xff" * 20 + raw[20:])
    elif damage == "shape":
        save_file({"activations": torch.zeros(130 * D)}, shard)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][1]["bytes"] = shard.stat().st_size
        write_json(folder / "manifest.json", manifest)
    elif damage == "foreign":
        write_json(folder / "manifest.json", {"format": "something else"})
    expected = "manifest.json" if damage in ("unfinished", "foreign") else "shard_00001.safetensors"
    with pytest.raises(ValueError, match=expected):
        ShuffledStream(ActivationStore.open(folder), 32).batch(0)


def test_widths_and_sizes_that_do_not_fit(store, tmp_path):
    with pytest.raises(ValueError, match="d_in=13"):
        Trainer(replace(SAE, d_in=13), TRAIN, store, tmp_path)
    with pytest.raises(ValueError, match="batch_size=501"):
        ShuffledStream(store, 501)
    with pytest.raises(ValueError, match="lr=-1"):
        TrainConfig(lr=-1)


# The command line of a process that sends itself SIGKILL: right before step 33, or with the checkpoint of step 40
# written but not yet in place.
DIES = {
    "in a step": """
from sampled_sae.training.batches import ShuffledStream
whole = ShuffledStream.batch
def batch(stream, t):
    if t == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(stream, t)
ShuffledStream.batch = batch
""",
    "in a save": """
replace = os.replace
def dies(source, target):
    saves.append(target) if target.name == "checkpoint.pt" else None
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)
saves, os.replace = [], dies
""",
}


def dying(program, command):
    exec(program, {"os": os, "signal": signal})
    return main(command)


@pytest.mark.parametrize("when", DIES)
def test_a_killed_process_leaves_a_checkpoint_from_which_the_run_is_completed(tmp_path, when):
    folder = write_store(tmp_path / "activations")
    out = tmp_path / "run"
    steps = 60
    command = [
        *["train", str(folder), str(out), "--features", "96", "--k", "3"],
        *["--l", "2", "--steps", str(steps), "--batch-size", "64", "--checkpoint-every", "20", "--quiet"],
        *["--threads", str(torch.get_num_threads())],  # sums are equal to the bit at equal threads
    ]
    status, said = run_forked(tmp_path / "log", dying, DIES[when], command)
    assert status == -signal.SIGKILL, said
    config = SampledSAEConfig(d_in=D, d_sae=96, k=3.0, l=2.0)
    train = TrainConfig(steps=steps, batch_size=64, checkpoint_every=20)
    store = ActivationStore.open(folder)
    resumed = Trainer(config, train, store, out)
    assert resumed.step == 20
    whole = Trainer(config, train, store, tmp_path / "whole").run(progress=False)
    assert same_weights(resumed.run(progress=False), whole)


def test_stored_shards_load_as_they_were_made(store):
    raw = [load_file(store.folder / f"shard_0000{i}.safetensors")["activations"] for i in range(3)]
    assert torch.equal(store.shard(0), raw[0])
    for n in (1, 200, 250, 10_000):
        assert torch.equal(store.first(n), torch.cat(raw)[:n])
