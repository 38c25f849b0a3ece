"""Saved SAEs: round trip, bad files, and writing that never leaves half a file."""

import json
import os

import pytest
import torch
from makers import cut, make_sae, tokens
from safetensors.torch import load_file, save_file

from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae import pretrained as pretrained_module
from sampled_sae.support.atomic_files import read_json, write_atomically, write_json, write_text
from sampled_sae.support.tensor_file import write_pieces

CONFIG, WEIGHTS = "config.json", "sae.safetensors"


@pytest.fixture
def saved(tmp_path):
    make_sae().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [{}, {"l": None, "select": "token", "score": "entropy", "aux_pool": None, "k_aux": 3}])
def test_round_trip_bit_for_bit(tmp_path, dtype, rule):
    sae = make_sae(dtype, **rule)
    for seed in range(2):
        sae(tokens(9, 12, dtype=dtype, seed=seed))
    sae.save_pretrained(str(tmp_path / "new" / "folder"))
    loaded = SampledSAE.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.cfg == sae.cfg
    for name, value in sae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
        assert value.dtype == loaded.state_dict()[name].dtype
    assert loaded.W_enc.stride() == sae.W_enc.stride()
    x = tokens(9, 12, dtype=dtype, seed=5)
    assert torch.equal(sae.eval().encode(x), loaded.eval().encode(x))
    sae.save_pretrained(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new/folder" / name).read_bytes()


def test_the_files_follow_the_ecosystem(saved):
    weights = load_file(saved / WEIGHTS)
    assert weights["W_enc"].shape == (12, 96)
    assert weights["W_enc"].is_contiguous()
    config = json.loads((saved / CONFIG).read_text())
    assert config["format"] == "sampled-sae"
    assert SampledSAEConfig.from_dict(config["sae"]) == make_sae().cfg
    assert sorted(file.name for file in saved.iterdir()) == [CONFIG, WEIGHTS]


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


def changed(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def weights_changed(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


BAD = {
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: no such file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "sae.safetensors: no such file"),
    "empty weights": (lambda f: cut(f / WEIGHTS, 0), "sae.safetensors: truncated or not a safetensors file"),
    "weights without header": (lambda f: cut(f / WEIGHTS, 5), "truncated or not"),
    "half a header": (lambda f: cut(f / WEIGHTS, 100), "truncated or not"),
    "half the weights": (lambda f: cut(f / WEIGHTS, 5000), "truncated or not"),
    "all weights but a byte": (lambda f: cut(f / WEIGHTS, -1), "truncated or not"),
    "foreign weights": (lambda f: (f / WEIGHTS).write_text("PK" * 900), "truncated or not"),
    "half a config": (lambda f: cut(f / CONFIG, 40), "config.json: not valid JSON"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "list config": (lambda f: (f / CONFIG).write_text("[1]"), "must hold a JSON object, holds a list"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"d_in": 3}'), "format=None: must be 'sampled-sae'"),
    "other format": (lambda f: changed(f, lambda c: c.update(format="gpt")), "format='gpt'"),
    "later version": (lambda f: changed(f, lambda c: c.update(version=9)), "version=9: this package reads 1"),
    "fields no object": (lambda f: changed(f, lambda c: c.update(sae=3)), "config.json: sae=3: must be"),
    "unknown field": (lambda f: changed(f, lambda c: c["sae"].update(depth=3)), r"unknown fields \['depth'\]"),
    "missing field": (lambda f: changed(f, lambda c: c["sae"].pop("k")), r"missing fields \['k'\]"),
    "bad field": (lambda f: changed(f, lambda c: c["sae"].update(k=-1)), r"k=-1: must be in \(0, 96\]"),
    "other d_sae": (lambda f: changed(f, lambda c: c["sae"].update(d_sae=97)), r"W_enc is \(12, 96\).*\(12, 97\)"),
    "missing tensor": (lambda f: weights_changed(f, lambda t: without(t, "b_enc")), "tensor 'b_enc' is missing"),
    "turned tensor": (
        lambda f: weights_changed(f, lambda t: {**t, "W_dec": t["W_dec"].t().contiguous()}),
        r"W_dec is \(12, 96\)",
    ),
    "counts of another size": (
        lambda f: weights_changed(f, lambda t: {**t, "tokens_since_active": torch.zeros(5, dtype=torch.int64)}),
        r"tokens_since_active is \(5,\)",
    ),
    "threshold of another shape": (
        lambda f: weights_changed(f, lambda t: {**t, "threshold": torch.zeros(2)}),
        r"threshold is \(2,\)",
    ),
    "NaN": (
        lambda f: weights_changed(f, lambda t: {**t, "W_dec": t["W_dec"].where(t["W_dec"] < 0.4, torch.nan)}),
        r"sae\.safetensors: W_dec holds NaN or inf",
    ),
    "inf": (
        lambda f: weights_changed(f, lambda t: {**t, "b_dec": t["b_dec"] / 0}),
        r"sae\.safetensors: b_dec holds NaN or inf",
    ),
    "no threshold": (
        lambda f: weights_changed(f, lambda t: {**t, "threshold": t["threshold"] + torch.nan}),
        r"sae\.safetensors: threshold holds NaN or inf",
    ),
    "scale": (
        lambda f: changed(f, lambda c: c["sae"].update(input_scale=0)),
        "input_scale=0: must be a finite number > 0",
    ),
    "scale of the training": (
        lambda f: (
            changed(f, lambda c: (c.pop("crc32"), c["sae"].pop("input_scale"))),
            (f / "run.json").write_text('{"activations": {"scale": -2}}'),
        ),
        "input_scale=-2: must be",
    ),
    "whole numbers": (
        lambda f: weights_changed(f, lambda t: {**t, "W_enc": t["W_enc"].long()}),
        "W_enc is torch.int64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_named(saved, name):
    spoil, words = BAD[name]
    spoil(saved)
    with pytest.raises(ValueError, match=words):
        SampledSAE.from_pretrained(saved)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/config\.json: no such file"):
        SampledSAE.from_pretrained(tmp_path / "nowhere")


class DiskFull(Exception):
    pass


@pytest.mark.parametrize("stage", ["before", "half", "rename", "fsync"])
def test_a_failed_write_leaves_the_old_files(saved, monkeypatch, stage):
    old = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(*args, **kwargs):
        raise DiskFull

    def half(path, *tensors):
        write_pieces(path, *tensors)
        cut(path, 1000)
        raise DiskFull

    if stage == "rename":
        monkeypatch.setattr(os, "replace", fail)
    elif stage == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(pretrained_module, "write_pieces", half if stage == "half" else fail)
    with pytest.raises(DiskFull):
        make_sae(seed=7).save_pretrained(saved)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == old
    assert torch.equal(SampledSAE.from_pretrained(saved).W_enc, make_sae().W_enc)
    make_sae(seed=7).save_pretrained(saved)
    assert torch.equal(SampledSAE.from_pretrained(saved).W_enc, make_sae(seed=7).W_enc)


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "value.json"
    write_json(path, {"a": 1})

    def write(temporary):
        assert temporary.parent == path.parent
        temporary.write_text('{"a": ')
        assert read_json(path) == {"a": 1}
        temporary.write_text('{"a": 2}')

    write_atomically(path, write)
    assert read_json(path) == {"a": 2}
    write_text(path, "é")
    assert path.read_text(encoding="utf-8") == "é"
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]
