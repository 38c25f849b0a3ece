"""Trainings on a tensor, an array or a file of one, without a store."""

import json

import numpy as np
import pytest
import torch
from makers import D, begun_training, same_weights, tokens
from safetensors.torch import save_file

from sampled_sae import ActivationStore, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.training import array_activations
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.array_activations import ArrayActivations, open_array
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.opening import as_activations
from sampled_sae.training.sae_group import SAEGroup
from sampled_sae.training.streamed_batches import StreamedBatches

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=12, batch_size=32, checkpoint_every=6, lr=3e-3)


@pytest.fixture
def x():
    return 3 * tokens(300, D, dtype=torch.float32) + 1


@pytest.fixture
def several_shards(monkeypatch):
    monkeypatch.setattr(array_activations, "SHARD_TOKENS", 100)


@pytest.mark.parametrize("kind", ["tensor", "array", "npy", "safetensors", "named", "pt", "float64"])
def test_a_training_equals_one_on_the_store_that_would_be_written(tmp_path, x, kind, several_shards):
    store = ActivationStore.write(tmp_path / "store", x, holdout=40, shard_tokens=100)
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    save_file({"x": x, "y": -x}, tmp_path / "both.safetensors")
    torch.save({"x": x}, tmp_path / "x.pt")
    given = {
        "tensor": x,
        "array": x.numpy(),
        "float64": x.double(),
        "npy": tmp_path / "x.npy",
        "safetensors": str(tmp_path / "x.safetensors"),
        "named": f"{tmp_path / 'both.safetensors'}:x",
        "pt": tmp_path / "x.pt",
    }[kind]
    ours = as_activations(given, holdout=40)
    assert ours.scale == store.scale
    assert torch.equal(ours.holdout()[0], x[-40:])
    expected = Trainer(SAE, TRAIN, store, tmp_path / "a").run(progress=False)
    assert same_weights(Trainer(SAE, TRAIN, ours, tmp_path / "b").run(progress=False), expected)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["activations"]["scale"] == store.scale


@pytest.mark.parametrize("n", range(60, 300, 20))
def test_the_order_in_memory_makes_no_difference(x, n):
    rows = x[:n]
    manifest = ArrayActivations(rows).manifest
    columns = rows.t().contiguous().t()
    for same in (columns, np.asfortranarray(rows.numpy()), torch.stack([rows, rows], 2)[..., 0], columns.double()):
        assert ArrayActivations(same).manifest == manifest
    scales = {
        StreamedBatches(ActivationStream(IteratorSource([same]), n).parts[0], 20, 0, 3).scale
        for same in (rows, columns, columns.numpy())
    }
    assert len(scales) == 1


def test_a_trainer_and_a_group_take_a_tensor_itself(tmp_path, x):
    alone = Trainer(SAE, TRAIN, x, tmp_path / "alone").run(progress=False)
    group = SAEGroup({"one": SAE, "two": SAE}, TRAIN, {"one": x, "two": x}, tmp_path / "group")
    assert group.members["one"].feed is group.members["two"].feed, "read once for both"
    assert same_weights(group.run(progress=False)["two"], alone)


def test_a_file_is_mapped_and_not_copied(tmp_path, x):
    np.save(tmp_path / "x.npy", x.numpy())
    assert isinstance(open_array(tmp_path / "x.npy")._x, np.memmap)


def test_a_resumed_training_knows_its_tensor(tmp_path, x):
    whole = Trainer(SAE, TRAIN, x, tmp_path / "whole").run(progress=False)
    begun_training(SAE, TRAIN, x, tmp_path / "run", steps=5)
    other = x.clone()
    other[7, 3] = -other[7, 3]  # of the same scale
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        Trainer(SAE, TRAIN, other, tmp_path / "run")
    resumed = Trainer(SAE, TRAIN, x, tmp_path / "run")
    assert resumed.step == 5
    assert same_weights(resumed.run(progress=False), whole)


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        (lambda x: x[:0], ValueError, "holds no tokens"),
        (lambda x: x[0], ValueError, r"shape=\(12,\): must be \[tokens, d\]"),
        (lambda x: x.long(), TypeError, "dtype=torch.int64"),
        (lambda x: x * 0, ValueError, "all activations are zero"),
        (lambda x: torch.where(x == x[5, 2], torch.nan, x), ValueError, "nan at token 5, dimension 2"),
        (lambda x: x * 1e20, ValueError, "must be at most 1e"),
        (lambda x: 3, TypeError, "store=int: must be an ActivationStore"),
        (lambda x: "nowhere.npy", ValueError, "nowhere.npy: no such file"),
        (lambda x: "nowhere", ValueError, "nowhere"),
    ],
)
def test_what_is_not_to_be_trained_on_is_named(tmp_path, x, bad, error, said):
    with pytest.raises(error, match=said):
        Trainer(SAE, TRAIN, bad(x), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_holdout_leaves_tokens_and_is_for_tensors(tmp_path, x):
    with pytest.raises(ValueError, match="holdout=300: must be less than 300"):
        ArrayActivations(x, holdout=300)
    with pytest.raises(ValueError, match="has no held-out part"):
        as_activations(x).holdout()
    store = ActivationStore.write(tmp_path / "store", x)
    with pytest.raises(ValueError, match="holdout=3: is for a tensor"):
        as_activations(store, holdout=3)


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.pt"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{name}: truncated or not a"):
        open_array(tmp_path / name)


def test_a_tensor_among_several_must_be_named(tmp_path, x):
    torch.save({"x": x, "y": x}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"several tensors, but x, y: name one, as in x\.pt:NAME"):
        open_array(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"no tensor 'z', but x, y"):
        open_array(f"{tmp_path / 'x.pt'}:z")


def test_the_commands_take_a_file(tmp_path, x, capsys):
    np.save(tmp_path / "x.npy", x.numpy())
    data, run = str(tmp_path / "x.npy"), str(tmp_path / "run")
    sizes = ["--features", "48", "--k", "3", "--batch-size", "32"]
    assert main(["train", data, run, *sizes, "--steps", "5", "--holdout", "64"]) == 0
    assert main(["evaluate", run, data, "--holdout", "64"]) == 0
    assert "tokens: 64" in capsys.readouterr().out
    swept = [
        "sweep",
        data,
        str(tmp_path / "sweep"),
        *sizes,
        "--steps",
        "3",
        "--holdout",
        "64",
        "--ls",
        "2",
        "--no-topk",
    ]
    assert main([*swept, "--scores", "l2"]) == 0
    assert main(["evaluate", run, data]) == 1
    assert "has no held-out part" in capsys.readouterr().err
    assert SampledSAE.from_pretrained(run).cfg.d_in == D


def test_a_file_is_the_same_by_another_path_and_after_a_move(tmp_path, x, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", x.numpy())
    options = ["--holdout", "64", "--quiet"]
    sizes = ["--features", "48", "--k", "3", "--batch-size", "32", *options]
    assert main(["train", "x.npy", "run", "--steps", "3", *sizes]) == 0
    assert main(["train", str(tmp_path / "x.npy"), "run", "--steps", "4", *sizes]) == 0, "goes on"
    assert main(["evaluate", "run", "./x.npy", *options]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x.npy").rename("elsewhere/y.npy")
    assert main(["train", "elsewhere/y.npy", "run", "--steps", "5", *sizes]) == 0, "the same bytes"
    np.save("x.npy", x.numpy() + 1)
    assert main(["train", "x.npy", "run", "--steps", "5", *sizes]) == 1
    assert "made with other settings (activations: source, scale)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("x.npz", lambda path, x: np.savez(path, x=x.numpy()), "must be the folder of a store or a file of a tensor"),
        ("x.csv", lambda path, x: path.write_text("1,2"), "must be the folder of a store or a file of a tensor"),
        ("x.pt", lambda path, x: torch.save({}, path), "x.pt: holds no tensor"),
        ("x.pt", lambda path, x: torch.save(torch.nn.Linear(2, 2), path), "not a file of tensors alone; nothing else"),
        ("x.pt", lambda path, x: torch.save(x.numpy(), path), "not a file of tensors alone; nothing else"),
    ],
)
def test_files_of_other_kinds_are_refused_in_a_line(tmp_path, x, name, write, said):
    write(tmp_path / name, x)
    with pytest.raises(ValueError, match=said):
        as_activations(tmp_path / name)


def test_old_files_foreign_names_and_entries_that_are_no_tensors(tmp_path, x):
    torch.save(x, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": x, "about": "a layer"}, tmp_path / "one.pt")
    torch.save({0: x, 1: x + 1}, tmp_path / "numbers.pt")
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "x.npy").rename(tmp_path / "X.NPY")
    for name in ("old.pt", "one.pt", "numbers.pt:0", "X.NPY"):
        found = as_activations(f"{tmp_path / name}")
        assert torch.equal(found.shard(0), as_activations(x).shard(0)), name


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda x: x.to("meta"),
        lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
        lambda x: np.ma.array(x.numpy(), mask=x.numpy() > 0),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_all_values_are_refused(x, change):
    with pytest.raises(TypeError, match=r"^x: a (sparse, nested or meta tensor|masked array)"):
        as_activations(change(x))
