"""Folders that are written to: one process at a time, checked before work begins, on every system."""

import errno
import importlib.util
import os
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import forked
from makers import D, names, tokens

from sampled_sae import ActivationStore, SAEGroup, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.support import output_folder
from sampled_sae.support.output_folder import LOCK, check_output_folder, locked
from sampled_sae.training.sweep import run_sweep

SAE = SampledSAEConfig(d_in=D, d_sae=96, k=3, l=2.0)
TRAIN = TrainConfig(steps=12, batch_size=64, checkpoint_every=6, log_every=2)


def hold(folder, pipe):
    """In a process of its own: says that it holds the folder, and lets go when it is told so."""
    with locked(folder, "a training"):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder():
    """Starts such a process for a folder; gives it and the pipe to it."""
    started = []

    def holds(folder):
        ours, theirs = forked().Pipe()
        process = forked().Process(target=hold, args=(folder, theirs))
        process.start()
        started.append((process, ours))  # a pipe that nobody holds is closed, which lets go
        assert ours.recv() == "held"
        return process, ours

    yield holds
    for process, _ in started:
        process.kill()
        process.join()


def test_two_trainings_in_one_folder(store, tmp_path, holder):
    other, pipe = holder(tmp_path / "run")
    message = (
        rf"run: in use by a training \(process {other.pid} on \S+\); wait for it, stop it or choose another folder"
    )
    with pytest.raises(BlockingIOError, match=message):
        Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert names(tmp_path / "run") == {LOCK}, "nothing was written beside the other's files"
    pipe.send("let go")
    other.join()
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert LOCK not in names(tmp_path / "run")


def test_the_lock_of_a_killed_process_holds_nobody(store, tmp_path, holder):
    other, _ = holder(tmp_path / "run")
    other.kill()
    other.join()
    assert LOCK in names(tmp_path / "run")
    Trainer(SAE, TRAIN, store, tmp_path / "run").run(progress=False)
    assert LOCK not in names(tmp_path / "run")


def test_a_member_s_folder_a_sweep_s_and_that_of_a_write(store, tmp_path, holder):
    holder(tmp_path / "group" / "b")
    configs = {"a": SAE, "b": replace(SAE, seed=1)}
    with pytest.raises(BlockingIOError, match="group/b: in use by a training"):
        SAEGroup(configs, TRAIN, store, tmp_path / "group").run(progress=False)
    assert not (tmp_path / "group" / "a").exists(), "let go of again"
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
    spec = importlib.util.spec_from_file_location("sampled_sae.support.on_windows", output_folder.__file__)
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
