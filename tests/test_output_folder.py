"""Folders that are written to: one process at a time, checked before work begins, on every system."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from makers import D, tokens, write_store

from sampled_sae import ActivationStore, SAEGroup, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.support import atomic_files, output_folder
from sampled_sae.support.atomic_files import read_json, write_atomically, write_json, write_text
from sampled_sae.support.output_folder import LOCK, check_output_folder, locked
from sampled_sae.training.checkpoint import CHECKPOINT
from sampled_sae.training.sweep import run_sweep

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=12, batch_size=64, checkpoint_every=6, log_every=2)


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    monkeypatch.setattr("sampled_sae.training.batches.CALIBRATION_TOKENS", 600)


@pytest.fixture
def store(tmp_path):
    return ActivationStore.open(write_store(tmp_path / "activations"))


def names(folder):
    return {path.name for path in folder.iterdir()}


# A process that holds the folder of its argument until its standard input is closed, and says when it does.
HOLDS = """
import sys
from pathlib import Path
from sampled_sae.support.output_folder import locked
with locked(Path(sys.argv[1]), "a training"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts such a process for a folder."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_two_trainings_in_one_folder(store, tmp_path, holder):
    other = holder(tmp_path / "run")
    message = (
        rf"run: in use by a training \(process {other.pid} on \S+\); wait for it, stop it or choose another folder"
    )
    with pytest.raises(BlockingIOError, match=message):
        Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert names(tmp_path / "run") == {LOCK}, "nothing was written beside the other's files"
    other.communicate()
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert LOCK not in names(tmp_path / "run")


def test_the_lock_of_a_killed_process_holds_nobody(store, tmp_path, holder):
    other = holder(tmp_path / "run")
    other.kill()
    other.wait()
    assert LOCK in names(tmp_path / "run")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert LOCK not in names(tmp_path / "run")


def test_a_member_s_folder_a_sweep_s_and_that_of_a_write(store, tmp_path, holder):
    holder(tmp_path / "group" / "b")
    configs = {"a": SAE, "b": replace(SAE, seed=1)}
    with pytest.raises(BlockingIOError, match="group/b: in use by a training"):
        SAEGroup(configs, TRAIN, store, tmp_path / "group").run(progress=False)
    assert names(tmp_path / "group" / "a") == {"metrics.jsonl"}, "let go of again"
    holder(tmp_path / "sweep")
    with pytest.raises(BlockingIOError, match="sweep: in use by a training"):
        run_sweep(configs, TRAIN, store, tmp_path / "sweep", progress=False)
    holder(tmp_path / "written")
    with pytest.raises(BlockingIOError, match="written: in use by a training"):
        ActivationStore.write(tmp_path / "written", tokens(50, D))


def test_within_one_process(tmp_path):
    with (
        locked(tmp_path / "x", "a sweep"),
        pytest.raises(BlockingIOError, match=rf"a sweep \(process {os.getpid()} "),
        locked(tmp_path / "x", "a training"),
    ):
        pass
    assert not (tmp_path / "x").exists(), "nothing came of the work"
    with locked(tmp_path / "x", "a training"):
        (tmp_path / "x" / "made").touch()
    assert names(tmp_path / "x") == {"made"}


def test_the_lock_of_windows(tmp_path, monkeypatch):
    """Its locks are of bytes of a file, and an open file cannot be removed."""
    held = {}  # inode -> descriptor; closing it lets go

    def is_open(inode, descriptor):
        try:
            return os.fstat(descriptor).st_ino == inode
        except OSError:
            return False

    def locking(descriptor, mode, count):
        inode = os.fstat(descriptor).st_ino
        if inode in held and held[inode] != descriptor and is_open(inode, held[inode]):
            raise PermissionError(errno.EACCES, "locked")
        held[inode] = descriptor

    unlink = Path.unlink

    def unlinks(path, missing_ok=False):
        if any(path.exists() and path.stat().st_ino == inode and is_open(inode, fd) for inode, fd in held.items()):
            raise PermissionError(errno.EACCES, "open")
        unlink(path, missing_ok)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "unlink", unlinks)
    spec = importlib.util.spec_from_file_location("on_windows", output_folder.__file__)
    on_windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_windows)
    for _ in range(2):
        with on_windows.locked(tmp_path / "x", "a sweep"):
            message = rf"x: in use by a sweep \(process {os.getpid()} "
            with pytest.raises(BlockingIOError, match=message), on_windows.locked(tmp_path / "x", "a training"):
                pass
            (tmp_path / "x" / "made").touch()
        assert names(tmp_path / "x") == {"made"}
    with pytest.raises(KeyboardInterrupt), on_windows.locked(tmp_path / "x", "a sweep"):
        raise KeyboardInterrupt
    assert names(tmp_path / "x") == {"made"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuses(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder, "_lock", refuses)
    with pytest.warns(UserWarning, match="no locks on this file system"), locked(tmp_path, "a training"):
        assert names(tmp_path) == {LOCK}
    assert names(tmp_path) == set()


def test_what_killed_writes_left_is_removed_by_the_next_start(store, tmp_path):
    left = (".checkpoint.pt.tmp", ".tmpegJyRT", ".run.json.tmp", LOCK)
    kept = ("notes.tmp", ".gitignore", ".tmp", "a.txt")
    (tmp_path / "run").mkdir()
    for name in (*left, *kept):
        (tmp_path / "run" / name).write_text("half")
    (tmp_path / "run" / ".cache.tmp").mkdir()
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert names(tmp_path / "run") & {*left, *kept, ".cache.tmp"} == {*kept, ".cache.tmp"}
    (tmp_path / "written").mkdir()
    for name in (".shard_00000.safetensors.tmp", LOCK):
        (tmp_path / "written" / name).write_text("half")
    ActivationStore.write(tmp_path / "written", tokens(50, D))
    assert names(tmp_path / "written") == {"manifest.json", "shard_00000.safetensors"}


@pytest.fixture(params=["file", "below a file", "read-only", "full"])
def bad_place(request, tmp_path, monkeypatch):
    """(a folder that cannot be written to, what is said of it)."""
    (tmp_path / "file").write_text("")
    if request.param == "file":
        return tmp_path / "file", "must be a folder, .* ?is a file"
    if request.param == "below a file":
        return tmp_path / "file" / "a" / "b", "must be a folder, but .*file is a file"
    if request.param == "read-only":  # root may write everywhere, so that permissions cannot be taken away

        def refuses(dir):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

        monkeypatch.setattr(output_folder.tempfile, "TemporaryFile", refuses)
        return tmp_path / "out", r"out\S*: cannot be written to \(Read-only file system\)"
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(1000))
    return tmp_path / "out", r"out\S*: 1e-06 GB are free on this disk, \S+ GB are needed"


def test_a_bad_place_is_known_before_anything_is_read(store, bad_place, monkeypatch):
    folder, message = bad_place
    monkeypatch.setattr(ActivationStore, "load", lambda self, entry: pytest.fail("activations were read"))
    with pytest.raises(ValueError, match=message):
        Trainer(SAE, TRAIN, store, folder)
    with pytest.raises(ValueError, match=message):
        SAEGroup({"a": SAE}, TRAIN, store, folder)


def test_a_sweep_and_a_write_know_a_bad_place(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ActivationStore, "load", lambda self, entry: pytest.fail("activations were read"))
    for folder in (tmp_path / "file", tmp_path / "file" / "sweep"):
        with pytest.raises(ValueError, match="must be a folder"):
            run_sweep({"a": SAE}, TRAIN, store, folder, progress=False)
        with pytest.raises(ValueError, match="must be a folder"):
            ActivationStore.write(folder, tokens(50, D))


def test_a_check_leaves_nothing(tmp_path):
    check_output_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == set()


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


@pytest.mark.parametrize("name", ["a:b", "a?", "con", "NUL.json", "a.", "a ", "a\\b", "COM1", "a\nb"])
def test_names_that_are_no_folder_s_on_some_system(store, tmp_path, name):
    with pytest.raises(ValueError, match="the name must be that of a folder"):
        SAEGroup({name: SAE}, TRAIN, store, tmp_path)


def test_names_that_are_one_folder_on_some_systems(store, tmp_path):
    with pytest.raises(ValueError, match=r"configs=\['A', 'a', 'b'\]: names must differ by more than case"):
        SAEGroup(dict.fromkeys(("a", "b", "A"), SAE), TRAIN, store, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(tmp_path, value):
    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    write_json(tmp_path / "a.json", {"a": value, "b": [1.5, (value, "x")], "c": {"d": value}})
    assert strict((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, [None, "x"]], "c": {"d": None}}
    assert strict(atomic_files.json_line({"a": value})) == {"a": None}
    assert read_json(tmp_path / "a.json")["a"] is None
