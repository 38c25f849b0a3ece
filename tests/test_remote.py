"""Shards, arrays and texts at a URL, by the file systems of fsspec that need no network."""

import gzip
import json

import fsspec
import pytest
import torch
from makers import D, same_weights, tokens
from safetensors.torch import save_file

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.lm import load_texts, shuffled_texts
from sampled_sae.support.remote_files import is_url
from sampled_sae.training.array_activations import open_array

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=6, batch_size=32)
X = 2 * tokens(300, D, dtype=torch.float32, seed=3) + 1


@pytest.fixture
def local(tmp_path):
    ActivationStore.write(tmp_path / "acts", X, holdout=40, shard_tokens=100)
    return tmp_path / "acts"


def put(path, url):
    for file in path.iterdir() if path.is_dir() else [path]:
        fsspec.filesystem("memory").pipe_file(f"{url}/{file.name}", file.read_bytes())


def urls(local, remote):
    put(local, f"{remote}/acts")
    return [f"{remote}/acts", f"file://{local}", f"{remote}/acts/"]


def test_a_store_at_a_url_is_that_of_the_folder(tmp_path, local, remote):
    here = ActivationStore.open(local)
    expected = Trainer(SAE, TRAIN, here, tmp_path / "here").run(progress=False)
    for i, url in enumerate(urls(local, remote)):
        store = ActivationStore.open(url)
        assert store.where == url.rstrip("/")
        assert torch.equal(store.shard(1, 3, 9), here.shard(1, 3, 9))
        assert torch.equal(store.holdout()[0], X[-40:])
        assert same_weights(Trainer(SAE, TRAIN, url, tmp_path / str(i)).run(progress=False), expected)


@pytest.mark.parametrize("cut", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", None])
def test_damage_at_a_url_is_named(local, remote, cut):
    put(local, f"{remote}/acts")
    files, file = fsspec.filesystem("memory"), "/data/acts/shard_00001.safetensors"
    data = files.cat_file(file)
    if cut is None:
        files.rm(file)
    else:
        files.pipe_file(file, cut(data))
    store = ActivationStore.open(f"{remote}/acts")
    with pytest.raises(ValueError, match=r"memory://data/acts/shard_00001\.safetensors: (corrupt|no such file)"):
        store.shard(1)


def test_what_is_not_there_is_named(remote):
    with pytest.raises(ValueError, match=r"memory://data/nothing/manifest\.json: no such file"):
        ActivationStore.open(f"{remote}/nothing")
    with pytest.raises(ValueError, match=r"memory://data/x\.npy: no such file"):
        open_array(f"{remote}/x.npy")
    with pytest.raises(ValueError, match=r"source='memory://data/t\.txt' is no file"):
        load_texts(f"{remote}/t.txt")
    with pytest.raises(ValueError, match="nonesuch://x: Protocol not known: nonesuch"):
        ActivationStore.open("nonesuch://x")


def test_an_array_at_a_url_is_copied_and_read(tmp_path, remote):
    save_file({"x": X, "y": -X}, tmp_path / "x.safetensors")
    put(tmp_path / "x.safetensors", remote)
    ours = open_array(f"{remote}/x.safetensors:y", holdout=40)
    assert torch.equal(ours.holdout()[0], -X[-40:])
    assert ours.where == f"{remote}/x.safetensors:y"


def test_texts_at_a_url_are_those_of_the_file(tmp_path, remote):
    texts = [f"text number {i}" for i in range(20)]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.upper().replace("BODY", "body").encode()))
    (tmp_path / "c.txt").write_text("one\ntext")
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt"):
        put(tmp_path / name, f"{remote}/texts")
    assert load_texts(f"{remote}/texts/a.jsonl:body") == texts
    assert load_texts(f"file://{tmp_path}/a.jsonl:body") == texts
    assert load_texts(f"{remote}/texts/b.jsonl.gz:body") == [text.upper() for text in texts]
    assert load_texts(f"{remote}/texts/c.txt") == load_texts(f"{remote}/texts") == ["one\ntext"]
    assert list(shuffled_texts(f"{remote}/texts/a.jsonl:body", 0)) == list(
        shuffled_texts(f"{tmp_path}/a.jsonl:body", 0)
    )


def test_results_are_written_to_folders(tmp_path, local, remote, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(local, f"{remote}/acts")
    sizes = ["--features", "48", "--k", "3", "--steps", "2", "--batch-size", "32"]
    assert main(["train", f"{remote}/acts", str(tmp_path / "run"), *sizes]) == 0
    assert main(["evaluate", str(tmp_path / "run"), f"{remote}/acts"]) == 0
    capsys.readouterr()
    assert main(["train", f"{remote}/acts", "memory://run", *sizes]) == 1
    assert "is a URL, which is read and not written to" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a URL, which is read and not written to"):
        ActivationStore.write("memory://new", X)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "run"]


def test_every_command_that_reads_a_store_reads_one_at_a_url(tmp_path, local, remote, capsys):
    put(local, f"{remote}/acts")
    url, run = f"{remote}/acts", str(tmp_path / "run")
    sizes = ["--features", "48", "--k", "3", "--steps", "2", "--batch-size", "32", "--quiet"]
    assert main(["train", url, run, *sizes]) == 0
    assert main(["sweep", url, str(tmp_path / "sweep"), *sizes, "--ls", "2", "--scores", "l2", "--no-topk"]) == 0
    assert main(["encode", url, str(tmp_path / "codes"), "--sae", run]) == 0
    assert main(["look", run, url, "--no-model"]) == 0
    assert main(["compare", run, run, "--activations", url, "--out", str(tmp_path / "compared")]) == 0
    command = ["export", run, str(tmp_path / "exported"), "--to", "saelens", "--model-name", "m", "--layer", "0"]
    assert main([*command, "--activations", url]) == 0, capsys.readouterr().err
    for command in (["encode", f"{remote}/x", run, "--sae", run], ["look", run, f"{remote}/x"]):
        assert main(command) == 1
        assert "memory://data/x/manifest.json: no such file" in capsys.readouterr().err


def test_what_is_a_url():
    assert all(map(is_url, ["s3://b/x", "memory://x", "simplecache::s3://b/x", "hf://datasets/x"]))
    assert not any(map(is_url, ["C:/x", "C:\\x", "x.npy:name", "hf:NAME:train", "/s3://x", "", "a b://x"]))
