"""Blocks of a stream that lie on disk and not in memory: the same batches, and nothing that stays behind."""

import errno
import resource
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from makers import D, same_weights, tokens

from sampled_sae import SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training import block_space
from sampled_sae.training.activation_stream import ActivationStream
from sampled_sae.training.iterator_source import IteratorSource
from sampled_sae.training.streamed_batches import StreamedBatches

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(steps=20, batch_size=32, checkpoint_every=6, log_every=2, lr=3e-3)
X = 2 * tokens(1000, D, dtype=torch.float32, seed=3) + 1


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "blocks").mkdir()
    return tmp_path / "blocks"


def stream(folder=None, x=X, buffer_tokens=128):
    return ActivationStream(IteratorSource(x.split(17)), buffer_tokens, folder)


def test_the_batches_are_those_of_blocks_in_memory(folder):
    on_disk, in_memory = (StreamedBatches(s.parts[0], 32, 0, 20) for s in (stream(folder), stream()))
    with on_disk.reading_ahead():
        for t in (*range(20), 0):
            assert torch.equal(on_disk.batch(t), in_memory.batch(t))
            assert not list(folder.iterdir()), "the files have no names"
    assert on_disk.scale == in_memory.scale


def test_a_training_goes_on_with_blocks_elsewhere(tmp_path, folder):
    whole = Trainer(SAE, TRAIN, stream(), tmp_path / "whole").run(progress=False)
    begun = Trainer(SAE, TRAIN, stream(folder), tmp_path / "run")
    for t in range(9):
        begun.train_on(begun.feed.batch(t))
    begun.save()
    assert same_weights(Trainer(SAE, TRAIN, stream(), tmp_path / "run").run(progress=False), whole)
    assert same_weights(Trainer(SAE, TRAIN, stream(folder), tmp_path / "other").run(progress=False), whole)
    assert not list(folder.iterdir())


def test_no_memory_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(block_space, "check_memory", lambda *_: pytest.fail("no block is in memory"))
    stream(folder, buffer_tokens=10**6)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_a_mapped_block_does_not_count_as_memory(folder):
    space = block_space.OnDisk(folder, D)
    space.add(X)
    found = space.whole()
    assert torch.equal(found, X)
    maps = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert maps == ["rw-s"], "shared with the file; what may be written to and is private is promised memory"


def test_a_disk_that_is_full_is_said(folder, tmp_path, monkeypatch):
    """A limit on the size of files stops a write in the same way; the checkpoint is small enough to be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            StreamedBatches(stream(folder).parts[0], 32, 0, 20).batch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(folder))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 100))
    with pytest.raises(ValueError, match=r"blocks: 1e-07 GB are free on this disk, 1.23e-05 GB are needed"):
        stream(folder)


@pytest.mark.parametrize("name", ["nothing", "file", "memory://blocks"])
def test_what_is_no_folder_is_refused(name, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=rf"buffer_on_disk=.*{name}: must be a folder that is there"):
        stream(name if "://" in name else tmp_path / name)
