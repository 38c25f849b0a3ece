"""Damage does not pass: shards, checkpoints and SAEs are verified when read; `verify` finds what `harvest` repairs."""

import json
from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE as SAE
from makers import SMALL_TRAIN as TRAIN
from makers import D, tokens, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import ActivationStore, SAEGroup, SampledSAE, Trainer
from sampled_sae.cli import main
from sampled_sae.support.atomic_files import read_json, write_json
from sampled_sae.training.checkpoint import CHECKPOINT, FIELDS, read_checkpoint, write_checkpoint


@pytest.fixture
def x():
    return tokens(500, D, dtype=torch.float32) + 0.3


@pytest.fixture
def store(x, tmp_path):
    return ActivationStore.write(tmp_path / "store", x, holdout=100, shard_tokens=150, source="made")


@pytest.fixture
def trained(store, tmp_path):
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    return tmp_path / "run"


def flip(path, place, bit=0):
    """One bit, at a share of the file."""
    raw = bytearray(path.read_bytes())
    raw[min(len(raw) - 1, int(place * len(raw)))] ^= 1 << bit
    path.write_bytes(raw)


def zero(path):
    """The values of a file become 0, and its size stays."""
    save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path)


DAMAGE = {
    "zeroed": zero,
    "first value's last bit": lambda path: flip(path, 0.3),
    "last value": lambda path: flip(path, 1, 6),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["shard_00000.safetensors", "shard_00002.safetensors", "holdout.safetensors"])
def test_a_damaged_file_of_a_store_is_named(store, tmp_path, damage, file):
    DAMAGE[damage](store.folder / file)
    read = store.holdout if file.startswith("holdout") else lambda: Trainer(SAE, TRAIN, store, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"{file}: .*; make the store again$"):
        read()
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_a_file_is_verified_once(store, monkeypatch):
    looked = []
    monkeypatch.setattr(
        "sampled_sae.training.activation_store.damage", lambda folder, entry: looked.append(entry["file"])
    )
    for i in (0, 1, 0, 1):
        store.shard(i)
    assert looked == ["shard_00000.safetensors", "shard_00001.safetensors"]


def without_checksums(folder):
    """The store as earlier versions wrote it."""
    manifest = read_json(folder / "manifest.json")
    for entry in [*manifest["shards"], manifest["holdout"]]:
        del entry["crc32"]
    write_json(folder / "manifest.json", manifest)
    return ActivationStore.open(folder)


def test_a_store_without_checksums_is_read_and_its_sums_of_squares_tell(store, x):
    old = without_checksums(store.folder)
    assert torch.equal(old.shard(1), x[150:300])
    assert len(old.holdout()[0]) == 100
    zero(store.folder / "shard_00001.safetensors")
    again = ActivationStore.open(store.folder)
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors: corrupt, its squares sum to 0 where"):
        again.shard(1)


def test_a_store_without_checksums_nor_sums_is_read(tmp_path):
    assert len(ActivationStore.open(write_store(tmp_path / "a")).shard(0)) == 200


@pytest.mark.parametrize(
    ("field", "value"), [("k", 4.0), ("input_scale", 0.5), ("apply_b_dec_to_input", False), ("select", "token")]
)
def test_a_config_that_was_changed_since(trained, field, value):
    """Within what is allowed, so that nothing but its checksum tells."""
    path = trained / "config.json"
    config = json.loads(path.read_text())
    assert config["sae"][field] != value
    config["sae"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: damaged, or edited by hand: then remove its line 'crc32'"):
        SampledSAE.from_pretrained(trained)
    del config["crc32"]
    path.write_text(json.dumps(config))
    assert getattr(SampledSAE.from_pretrained(trained).cfg, field) == value


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_in_a_checkpoint(trained, store, place, bit):
    flip(trained / CHECKPOINT, place, bit)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: (damaged|truncated)"):
        Trainer(SAE, TRAIN, store, trained)


def test_every_flipped_bit_of_a_small_checkpoint(tmp_path):
    path = tmp_path / CHECKPOINT
    state = {name: kind() for name, kind in FIELDS.items()}
    write_checkpoint(path, {**state, "sae": {"W_enc": torch.ones(3, 2)}})
    assert torch.equal(read_checkpoint(path)["sae"]["W_enc"], torch.ones(3, 2))
    raw = path.read_bytes()
    for i in range(len(raw)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint\.pt: "):
            read_checkpoint(path)


def rewritten(path, change):
    """A checkpoint as torch.save writes it alone, with a change."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_checkpoint_of_torch_alone_is_read_and_verified(trained, store):
    rewritten(trained / CHECKPOINT, lambda state: None)
    assert Trainer(SAE, TRAIN, store, trained).step == TRAIN.steps
    flip(trained / CHECKPOINT, 0.5)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged, checkpoint/data/\d+ in it does not have"):
        Trainer(SAE, TRAIN, store, trained)


def spoil(part, *names):
    def change(state):
        tensor = state[part]
        for name in names:
            tensor = tensor[name]
        tensor[(-1,) * tensor.dim()] = float("nan")

    return change


BAD_CHECKPOINTS = {
    "NaN weight": (spoil("sae", "W_enc"), r"sae\.W_enc: 1 of 1152 values are NaN or inf"),
    "NaN bias": (spoil("sae", "b_dec"), r"sae\.b_dec: 1 of 12 values"),
    "inf decoder": (lambda s: s["sae"]["W_dec"].fill_(float("inf")), r"sae\.W_dec: 1152 of 1152 values"),
    "no optimizer": (lambda s: s.pop("optimizer"), r"optimizer=None: must be of type dict"),
    "no step": (lambda s: s.pop("step"), r"step=None: must be of type int"),
    "no generator": (lambda s: s.pop("generator"), r"generator=None: must be of type Tensor"),
    "no weights": (lambda s: s["sae"].pop("W_dec"), r"damaged, it does not fit its own settings"),
    "other shape": (lambda s: s["sae"].update(b_enc=torch.zeros(3)), r"damaged, it does not fit its own settings"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_checkpoint_that_no_training_can_go_on_from(trained, store, name):
    change, message = BAD_CHECKPOINTS[name]
    rewritten(trained / CHECKPOINT, change)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: {message}"):
        Trainer(SAE, TRAIN, store, trained)


def test_moments_that_are_not_finite(trained, store):
    def change(state):
        moments = [t for entry in state["optimizer"]["state"].values() for t in entry.values() if torch.is_tensor(t)]
        max(moments, key=torch.Tensor.numel).fill_(float("nan"))

    rewritten(trained / CHECKPOINT, change)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: optimizer\.state.* are NaN or inf"):
        Trainer(SAE, TRAIN, store, trained)


@pytest.mark.parametrize("place", [0.5, 0.99])
def test_a_damaged_sae(trained, place):
    flip(trained / "sae.safetensors", place)
    with pytest.raises(ValueError, match=r"sae\.safetensors: damaged"):
        SampledSAE.from_pretrained(trained)


def test_an_sae_without_a_checksum_is_read(trained):
    save_file(load_file(trained / "sae.safetensors"), trained / "sae.safetensors", {"format": "sampled-sae 1"})
    SampledSAE.from_pretrained(trained)


def lines(capsys):
    """file name -> what is said of it."""
    said = capsys.readouterr().out.splitlines()
    return {line.split(": ")[0].rsplit("/", 1)[-1]: line.split(": ", 1)[1] for line in said}


def test_verify_a_store(store, capsys):
    assert main(["verify", str(store.folder)]) == 0
    files = ["manifest.json", *(f"shard_0000{i}.safetensors" for i in range(3)), "holdout.safetensors"]
    assert lines(capsys) == dict.fromkeys(files, "ok")
    flip(store.folder / "shard_00001.safetensors", 0.7)
    (store.folder / "holdout.safetensors").unlink()
    assert main(["verify", str(store.folder)]) == 1
    said = lines(capsys)
    assert said.pop("shard_00001.safetensors").startswith("corrupt, checksum ")
    assert said.pop("holdout.safetensors") == "no such file, but the manifest lists it"
    assert set(said.values()) == {"ok"}
    (store.folder / "manifest.json").write_text('{"format": 3')
    assert main(["verify", str(store.folder)]) == 1
    assert lines(capsys)["manifest.json"].startswith("not valid JSON")


def test_verify_a_store_without_checksums(store, capsys):
    old = without_checksums(store.folder)
    assert main(["verify", str(old.folder)]) == 0
    assert "no checksum" in lines(capsys)["holdout.safetensors"]
    write_json(old.folder / "manifest.json", {**old.manifest, "complete": False})
    assert main(["verify", str(old.folder)]) == 1
    assert "has not finished" in lines(capsys)["manifest.json"]
    write_json(old.folder / "manifest.json", {**old.manifest, "scale": old.scale * 1.01})
    assert main(["verify", str(old.folder)]) == 1
    assert "where the shards' sums give" in lines(capsys)["manifest.json"]


def test_verify_a_training_and_a_group(trained, store, tmp_path, capsys):
    assert main(["verify", str(trained)]) == 0
    files = ["run.json", "metrics.jsonl", CHECKPOINT, "config.json", "sae.safetensors"]
    assert lines(capsys) == dict.fromkeys(files, "ok")
    SAEGroup({"a": SAE, "b": replace(SAE, seed=1)}, TRAIN, store, tmp_path / "group").run(progress=False)
    flip(tmp_path / "group" / "b" / CHECKPOINT, 0.4)
    (tmp_path / "group" / "a" / "sae.safetensors").unlink()
    assert main(["verify", str(tmp_path / "group")]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": ok")]
    assert len(bad) == 2
    assert "a/sae.safetensors: no such file" in bad[0]
    assert f"b/{CHECKPOINT}: damaged" in bad[1]


def test_verify_an_sae_and_its_metrics(trained, capsys):
    (trained / CHECKPOINT).unlink()
    flip(trained / "sae.safetensors", 0.6)
    (trained / "metrics.jsonl").write_text('{"step": 1}\n{"step": ')
    assert main(["verify", str(trained)]) == 1
    said = lines(capsys)
    assert said["metrics.jsonl"].startswith("line 2")
    assert said["sae.safetensors"].startswith("damaged")
    assert said["config.json"] == "ok"


def test_verify_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for folder, message in ((tmp_path, "holds no activations"), (tmp_path / "none", "no such folder")):
        assert main(["verify", str(folder)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "factor"), [("scale", 2.0), ("scale", 1.0001), ("sum_squares", 3.0), ("tokens", 2)])
def test_a_manifest_whose_scale_is_not_that_of_its_shards(store, name, factor):
    path = store.folder / "manifest.json"
    manifest = read_json(path)
    values = manifest if name == "scale" else manifest["shards"][1]
    values[name] *= factor
    write_json(path, manifest)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged, scale=\S+ where the shards' sums give"):
        ActivationStore.open(store.folder)
