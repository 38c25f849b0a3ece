"""`ActivationStore.write`: what it stores, what it refuses, and that stores without text train and evaluate."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import SMALL_SAE as SAE
from makers import contents, same_weights
from safetensors.torch import load_file

from sampled_sae import ActivationStore, SampledSAE, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.training.evaluation import evaluate_activations
from sampled_sae.training.sweep import evaluate

N, D = 500, 12


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(40, D, generator=generator)
    return torch.rand(N, 40, generator=generator).pow(8) @ mixing + 0.3


def raw(store):
    """(training tokens, held-out tokens) as they lie on disk, in order."""
    shards = [load_file(store.folder / shard["file"])["activations"] for shard in store.manifest["shards"]]
    held_out = store.manifest["holdout"]
    return torch.cat(shards), None if held_out is None else load_file(store.folder / held_out["file"])["activations"]


def test_a_store_holds_the_tokens_in_order_and_the_last_ones_apart(x, tmp_path):
    store = ActivationStore.write(tmp_path / "new" / "store", x, holdout=60, shard_tokens=150, source="made")
    assert store.tokens == [150, 150, 140]
    train, held_out = raw(store)
    assert torch.equal(train, x[:440])
    assert torch.equal(held_out, x[440:])
    assert store.scale**2 * x[:440].square().sum(1).mean() == pytest.approx(D, rel=1e-5)
    activations, rows = store.holdout()
    assert torch.equal(activations, x[440:])
    assert rows is None
    assert not store.has_text
    with pytest.raises(ValueError, match="no token rows"):
        store.holdout_rows()
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["source"] == "made"
    assert ActivationStore.open(store.folder) == store
    assert {file.name for file in store.folder.iterdir()} == {
        "manifest.json",
        "holdout.safetensors",
        *(shard["file"] for shard in manifest["shards"]),
    }


@pytest.mark.parametrize("source", [Path("of/a/file.pt"), 5])
def test_a_source_is_recorded_as_text(tmp_path, source):
    """As by ArrayActivations; a manifest with anything else could not be read again."""
    store = ActivationStore.write(tmp_path / "store", torch.ones(4, 3), source=source)
    assert store.manifest["source"] == str(source)


def cut(x, sizes):
    start = 0
    for size in sizes:
        yield x[start : start + size]
        start += size


@pytest.mark.parametrize("holdout", [0, 1, 170, 499])
@pytest.mark.parametrize("sizes", [[500], [1] * 500, [3, 0, 297, 200], [150, 150, 200]])
def test_chunks_of_any_sizes_give_the_same_files(x, tmp_path, sizes, holdout):
    whole = ActivationStore.write(tmp_path / "whole", x, holdout=holdout, shard_tokens=150)
    chunks = ActivationStore.write(tmp_path / "chunks", cut(x, sizes), holdout=holdout, shard_tokens=150)
    assert contents(whole.folder) == contents(chunks.folder)
    assert sum(whole.tokens) == N - holdout


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(">f4"),
        lambda x: np.flip(np.flip(x.numpy(), 0).copy(), 0),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.t().contiguous().t(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.double(),
        lambda x: [x[:100].numpy(), x[100:]],
        lambda x: (part for part in x.split(70)),
    ],
)
def test_tensors_arrays_and_lists_give_the_same_files(x, tmp_path, form):
    expected = ActivationStore.write(tmp_path / "a", x, holdout=30)
    assert contents(ActivationStore.write(tmp_path / "b", form(x), holdout=30).folder) == contents(expected.folder)


def test_a_read_only_array_on_disk(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = ActivationStore.write(tmp_path / "store", np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert torch.equal(raw(store)[0], x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16])
def test_shards_of_16_bits(x, tmp_path, dtype):
    store = ActivationStore.write(tmp_path / "store", x, holdout=10, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert all(torch.equal(part, given.to(wanted)) for part, given in zip(raw(store), (x[:490], x[490:])))
    assert store.shard(0).dtype == torch.float32
    assert store.manifest["dtype"] == str(dtype).removeprefix("torch.")


def test_an_iterator_is_streamed_and_may_reuse_its_memory(x, tmp_path):
    """While a chunk is asked for, all shards that its predecessors fill are on disk already."""
    buffer, seen = torch.empty(50, D), []

    def chunks():
        for part in x.split(50):
            seen.append(len(list(tmp_path.glob("store/shard_*"))))
            buffer.copy_(part)
            yield buffer

    store = ActivationStore.write(tmp_path / "store", chunks(), holdout=100, shard_tokens=100)
    assert seen == [max(0, (50 * i - 100) // 100) for i in range(10)]
    train, held_out = raw(store)
    assert torch.equal(torch.cat([train, held_out]), x)


@pytest.mark.parametrize("number", [np.int64(40), torch.tensor(40), np.array(40)])
def test_numbers_of_other_libraries(x, tmp_path, number):
    store = ActivationStore.write(tmp_path / "store", x, holdout=number, shard_tokens=number)
    assert store.manifest["settings"]["holdout"] == 40
    assert store.tokens == [40] * 11 + [20]


def spoiled(x, token, value):
    x = x.clone()
    x[token, 7] = value
    return x


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda x: x[0], {}, r"x: shape=\(12,\): must be \[tokens, d\]"),
        (lambda x: x[None], {}, r"x: shape=\(1, 500, 12\): must be"),
        (lambda x: x[:, :0], {}, r"x: shape=\(500, 0\): must be"),
        (lambda x: [x[0], x[1]], {}, r"x, chunk 0: shape=\(12,\): must be"),
        (lambda x: [x, x[:, :5]], {}, r"x, chunk 1: shape=\(500, 5\): must be \[m, 12\]"),
        (lambda x: x.long(), {}, "x: dtype=torch.int64: must be float16"),
        (lambda x: x.numpy().astype(int), {}, "x: dtype=int64: must be float16"),
        (lambda x: x.to(torch.complex64), {}, "x: dtype=torch.complex64: must be"),
        (lambda x: 3.0, {}, "x=float: must be a tensor"),
        (lambda x: [[1.0, 2.0]], {}, "x, chunk 0: list: must be a torch.Tensor"),
        (lambda x: x[:0], {}, "x: holds no tokens"),
        (lambda x: iter([]), {}, "x: holds no tokens"),
        (lambda x: torch.zeros(5, 3), {}, "all activations are zero"),
        (lambda x: spoiled(x, 333, float("nan")), {}, "x: nan at token 333, dimension 7"),
        (lambda x: spoiled(x, 333, float("-inf")).split(200), {}, "x, chunk 1: -inf at token 133, dimension 7"),
        (lambda x: spoiled(x, 333, 1e6), {"dtype": "float16"}, "dtype='float16' cannot hold .* reach 1e"),
        (lambda x: spoiled(x.double(), 333, 1e60), {}, "dtype='float32' cannot hold .* reach 1e"),
        (lambda x: x, {"dtype": "int8"}, "dtype='int8': must be one of"),
        (lambda x: x, {"holdout": 500}, "holdout=500: must be less than 500"),
        (lambda x: x.split(70), {"holdout": 500}, "holdout=500: must be less than 500"),
        (lambda x: x, {"holdout": -1}, "holdout=-1: must be a whole number"),
        (lambda x: x, {"holdout": 0.1}, "holdout=0.1: must be a whole number"),
        (lambda x: x, {"shard_tokens": 0}, "shard_tokens=0: must be a whole number"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(x, tmp_path, make, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ActivationStore.write(tmp_path / "store", make(x), **{"shard_tokens": 100, **given})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("moment", range(5))  # 3 shards, the held-out part, the manifest
def test_a_write_that_fails_leaves_nothing(x, tmp_path, monkeypatch, moment):
    real, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        real(source, target)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        ActivationStore.write(tmp_path / "there", x, holdout=200, shard_tokens=100)
    assert list((tmp_path / "there").iterdir()) == [], "a folder that was there stays"
    monkeypatch.setattr(os, "replace", real)
    assert sum(ActivationStore.write(tmp_path / "there", x, holdout=200, shard_tokens=100).tokens) == 300


class Killed(BaseException):
    pass


def test_a_killed_write_does_not_open_and_is_not_written_over(x, tmp_path, monkeypatch):
    def chunks():
        yield x
        raise Killed

    monkeypatch.setattr("sampled_sae.training.store_writer.StoreWriter.delete_files", lambda self: None)
    with pytest.raises(Killed):
        ActivationStore.write(tmp_path / "store", chunks(), shard_tokens=100)
    with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
        ActivationStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match="must be new or empty, holds files, but no store"):
        ActivationStore.write(tmp_path / "store", x)


def test_folders_that_are_taken(x, tmp_path):
    store = ActivationStore.write(tmp_path / "store", x)
    before = contents(store.folder)
    with pytest.raises(ValueError, match="must be new or empty, holds a complete store"):
        ActivationStore.write(store.folder, x)
    assert contents(store.folder) == before
    manifest = {**store.manifest, "complete": False}
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds a harvest that has not finished"):
        ActivationStore.write(store.folder, x)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, is a file"):
        ActivationStore.write(tmp_path / "file", x)


TRAIN = TrainConfig(steps=np.int64(300), batch_size=64, log_every=50, lr=1e-2)


def test_trainer_and_evaluation_on_a_written_store(x, tmp_path):
    store = ActivationStore.write(tmp_path / "store", x.split(33), holdout=100, shard_tokens=128)
    sae = Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    held_out, _ = store.holdout()
    result = evaluate(sae, held_out, 64, None)
    assert result["tokens"] == 100
    assert 0 < result["fvu"] < 0.5
    again = Trainer(SAE, TRAIN, store, tmp_path / "run")
    assert again.step == 300
    assert same_weights(again.run(progress=False), sae)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["activations"]["scale"] == store.scale
    other = ActivationStore.write(tmp_path / "other", x.flip(0), holdout=100, shard_tokens=128)
    with pytest.raises(ValueError, match="made with other settings"):
        Trainer(SAE, TRAIN, other, tmp_path / "run")
    no_holdout = ActivationStore.write(tmp_path / "no_holdout", x)
    with pytest.raises(ValueError, match="has no held-out part"):
        no_holdout.holdout()


def test_both_counts_of_an_evaluation_in_a_language_model_are_kept(x):
    sae = SampledSAE(SAE).eval()
    sae.calibrate(x)
    result = evaluate(sae, x, 64, lambda reconstruct: {"tokens": 7.0, "spliced_tokens": 5.0, "ce_clean": 1.0})
    assert (result["tokens"], result["predicted_tokens"], result["spliced_tokens"]) == (N, 7.0, 5.0)
    assert evaluate_activations(sae, x, 64).items() <= result.items()


TRAINING = ["--features", "64", "--k", "3", "--steps", "20", "--batch-size", "64", "--quiet"]


def test_the_commands_on_a_written_store(x, tmp_path, capsys):
    store = ActivationStore.write(tmp_path / "store", x, holdout=100, source="made here").folder
    assert main(["train", str(store), str(tmp_path / "sae"), *TRAINING, "--l", "2"]) == 0
    assert main(["evaluate", str(tmp_path / "sae"), str(store)]) == 0
    result = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    assert result["tokens"] == 100
    assert "ce_spliced" not in result
    assert main(["sweep", str(store), str(tmp_path / "sweep"), *TRAINING, "--ls", "2", "--scores", "l2"]) == 0
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert report.startswith("# Sampled-SAE on activations, made here\n")
    assert "evaluated on 100 held-out tokens" in report
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "sae"), str(store), "--splice-rows", "4"]) == 1
    assert "has no token rows" in capsys.readouterr().err
