"""Files are written whole or not at all, on every system, and JSON is strict."""

import errno
import json
import os

import pytest
import torch
from makers import D, names, tokens

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.support import atomic_files
from sampled_sae.support.atomic_files import read_json, write_atomically, write_json, write_text
from sampled_sae.training.checkpoint import CHECKPOINT

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=12, batch_size=64, checkpoint_every=6, log_every=2)


def full_disk(monkeypatch, name, after=0):
    """Files of this name cannot be written, after so many that could."""
    real, seen = open, []

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def opens(file, mode="r", *rest, **named):
        whole = real(file, mode, *rest, **named)
        if os.fspath(file).endswith(name) and mode in ("wb", "a"):
            seen.append(file)
            if len(seen) > after:
                return Full(whole)
        return whole

    for module in ("sampled_sae.training.checkpoint", "sampled_sae.support.atomic_files"):
        monkeypatch.setattr(f"{module}.open", opens, raising=False)


@pytest.mark.parametrize(("name", "after"), [(".checkpoint.pt.tmp", 1), ("metrics.jsonl", 4)])
def test_a_full_disk_is_one_line_and_nothing_saved_is_lost(store, tmp_path, monkeypatch, capsys, name, after):
    out = tmp_path / "run"
    command = [
        "train",
        str(store.folder),
        str(out),
        "--features",
        "96",
        "--k",
        "3",
        "--steps",
        "12",
        "--log-every",
        "2",
    ]
    command += ["--batch-size", "64", "--checkpoint-every", "6", "--quiet"]
    full_disk(monkeypatch, name, after)
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{out / name.removeprefix('.').removesuffix('.tmp')}: No space left on device")
    monkeypatch.undo()
    assert names(out) == {CHECKPOINT, "metrics.jsonl"}
    assert main(command) == 0
    assert main([*command[:2], str(tmp_path / "whole"), *command[3:]]) == 0
    for file in ("metrics.jsonl", "sae.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.fixture
def windows(monkeypatch):
    """Flushing needs a file open for writing, folders cannot be opened, readers stop a rename for a while."""
    fcntl = pytest.importorskip("fcntl")
    flush, rename, opens, refused = os.fsync, os.replace, os.open, []

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flush(descriptor)

    def replaces(source, target):
        if len(refused) % 3 < 2:
            refused.append(target)
            raise PermissionError(errno.EACCES, "used by another process", str(source))
        refused.append(target)
        rename(source, target)

    def os_open(path, *rest, **named):
        if os.path.isdir(path) and not named:
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return opens(path, *rest, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaces)
    monkeypatch.setattr(atomic_files.os, "open", os_open)
    monkeypatch.setattr(atomic_files.time, "sleep", lambda seconds: None)


def test_every_save_on_windows(windows, tmp_path):
    store = ActivationStore.write(tmp_path / "store", tokens(300, D, dtype=torch.float32), holdout=50)
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert {CHECKPOINT, "config.json", "sae.safetensors", "run.json", "metrics.jsonl"} == names(tmp_path / "run")
    write_text(tmp_path / "a.csv", "a\r\nb\n")
    assert (tmp_path / "a.csv").read_bytes() == b"a\r\nb\n", "line ends are written as they are given"


def test_a_rename_that_is_refused_for_good(tmp_path, monkeypatch):
    def refuses(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    monkeypatch.setattr(os, "replace", refuses)
    monkeypatch.setattr(atomic_files.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {})
    assert names(tmp_path) == set()


def test_files_get_the_usual_permissions(tmp_path):
    if os.name != "posix":
        pytest.skip("permissions of POSIX")
    (tmp_path / "usual").touch()

    def private(path):
        path.write_text("x")
        path.chmod(0o600)

    write_atomically(tmp_path / "ours", private)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(tmp_path, value):
    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    write_json(tmp_path / "a.json", {"a": value, "b": [1.5, (value, "x")], "c": {"d": value}})
    assert strict((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, [None, "x"]], "c": {"d": None}}
    assert strict(atomic_files.json_line({"a": value})) == {"a": None}
    assert read_json(tmp_path / "a.json")["a"] is None
