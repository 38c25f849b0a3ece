"""Harvests that are written to a URL, by the file systems of fsspec that need no network."""

import json

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tiny_models import CONTEXT, VOCABULARY, llama

from sampled_sae import ActivationStore
from sampled_sae.cli import main
from sampled_sae.lm import harvest, harvest_beside, harvest_mlp
from sampled_sae.support.remote_files import RemotePath, output_place

HOW = {"batch_size": 2, "rows_per_shard": 3, "holdout_rows": 2, "source": "random", "progress": False}
ROWS = torch.randint(0, VOCABULARY, (11, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama().eval()


def at(url):
    """What is written there, by name."""
    files = fsspec.filesystem("memory")
    start = "/" + url.removeprefix("memory://") + "/"
    return {name.removeprefix(start): files.cat_file(name) for name in files.find(start)}


def in_folder(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_are_those_of_a_folder(model, remote, tmp_path):
    assert harvest(model, ROWS, 1, tmp_path / "acts", **HOW) == harvest(model, ROWS, 1, f"{remote}/acts/", **HOW)
    assert at(f"{remote}/acts") == in_folder(tmp_path / "acts")
    harvest_mlp(model, ROWS, 1, tmp_path / "mlp", **HOW)
    assert harvest_mlp(model, ROWS, 1, f"{remote}/mlp", **HOW).where.startswith("memory://data/mlp/inputs with ")
    assert at(f"{remote}/mlp") == in_folder(tmp_path / "mlp")
    harvest_beside(model, ROWS, [0, 2], tmp_path / "stack", **HOW)
    assert harvest_beside(model, ROWS, [0, 2], f"{remote}/stack", **HOW).layers == 2
    assert at(f"{remote}/stack") == in_folder(tmp_path / "stack")
    with pytest.raises(ValueError, match="memory://data/mlp: holds a harvest of two places; use another folder"):
        harvest(model, ROWS, 1, f"{remote}/mlp", **HOW)
    with pytest.raises(ValueError, match="memory://data/acts: holds a harvest of one place"):
        harvest_mlp(model, ROWS, 1, f"{remote}/acts", **HOW)


def test_the_url_of_a_folder_here_is_the_folder(model, tmp_path):
    harvest(model, ROWS, 1, f"file://{tmp_path}/url", **HOW)
    harvest(model, ROWS, 1, tmp_path / "path", **HOW)
    assert in_folder(tmp_path / "url") == in_folder(tmp_path / "path")
    assert output_place(f"file://{tmp_path}/url") == tmp_path / "url"


def test_a_harvest_that_was_stopped_goes_on(model, remote, monkeypatch):
    harvest(model, ROWS, 1, f"{remote}/whole", **HOW)
    write, written = MemoryFileSystem.pipe_file, []

    def failing(self, path, value, **how):
        if len(written) == 3:
            raise OSError("the line is cut")
        written.append(path)
        return write(self, path, value, **how)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    with pytest.raises(OSError, match=r"memory://data/acts/\S+: cannot be written \(the line is cut\)"):
        harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", write)
    with pytest.raises(ValueError, match="the harvest has not finished; run the same harvest command again"):
        ActivationStore.open(f"{remote}/acts")
    with pytest.raises(ValueError, match="memory://data/acts was harvested with layer=1, this call has layer=2"):
        harvest(model, ROWS, 2, f"{remote}/acts", **HOW)
    passes = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
    handle.remove()
    assert at(f"{remote}/acts") == at(f"{remote}/whole")
    assert len(passes) == 5, "of two shards of three rows and the two held out; the first is there"


def test_a_lost_connection_is_no_empty_folder(model, remote, monkeypatch):
    harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
    before = at(f"{remote}/acts")

    def cut(*_, **__):
        raise ConnectionError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", cut)
        # as the file systems of stores of objects have them, which take every error for an answer
        patch.setattr(MemoryFileSystem, "exists", AbstractFileSystem.exists)
        patch.setattr(MemoryFileSystem, "isfile", AbstractFileSystem.isfile)
        with pytest.raises(
            OSError, match=r"memory://data/acts/manifest\.json: cannot be looked up \(the line is cut\)"
        ):
            harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
        with pytest.raises(OSError, match="memory://data/acts/x: cannot be looked up"):
            (RemotePath(f"{remote}/acts") / "x").is_file()
    assert at(f"{remote}/acts") == before


def test_what_another_process_writes_is_seen(remote, monkeypatch):
    """Also where a kind of URL keeps the listings of its folders, as that of the hub does."""
    listed, info, files = {}, MemoryFileSystem.info, fsspec.filesystem("memory")

    def from_listing(self, path, **options):
        if path not in listed.setdefault(self._parent(path), [*self.store]):
            raise FileNotFoundError(path)
        return info(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", from_listing)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: listed.clear())
    manifest, shard = (RemotePath(f"{remote}/acts/{name}") for name in ("manifest.json", "shard"))
    for path, look in ((manifest, manifest.exists), (shard, shard.is_file)):
        assert not look()
        files.pipe_file(f"/data/acts/{path.name}", b"text")
        assert look()


def test_folders_above_a_file_are_made(tmp_path):
    RemotePath(f"file://{tmp_path}/a/b/file").write_bytes(b"text")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"text"


def test_a_shard_of_another_size_is_written_again(model, remote):
    harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
    before = at(f"{remote}/acts")
    files = fsspec.filesystem("memory")
    files.pipe_file("/data/acts/shard_00001.safetensors", b"cut")
    files.rm("/data/acts/holdout.safetensors")
    harvest(model, ROWS, 1, f"{remote}/acts", **HOW)
    assert at(f"{remote}/acts") == before


def test_what_cannot_be_written_to_is_said(model):
    class ReadAlone(MemoryFileSystem):
        protocol = "readalone"

        def pipe_file(self, *_, **__):
            raise NotImplementedError

    fsspec.register_implementation("readalone", ReadAlone, clobber=True)
    with pytest.raises(
        OSError, match=r"readalone://x/manifest\.json: URLs of this kind can be read and not written to"
    ):
        harvest(model, ROWS, 1, "readalone://x", **HOW)
    with pytest.raises(ValueError, match="nosuchkind://x"):
        harvest(model, ROWS, 1, "nosuchkind://x", **HOW)


TRAINING = ["--features", "32", "--k", "3", "--l", "2", "--steps", "4", "--batch-size", "64", "--quiet"]


@pytest.mark.parametrize(
    ("place", "of_sae"),
    [(["--layer", "1"], []), (["--layer", "1", "--mlp"], ["--skip"]), (["--layer", "0", "--beside", "2"], [])],
    ids=["one", "pair", "stack"],
)
def test_the_commands_train_and_evaluate_from_there(causal, texts, remote, tmp_path, capsys, place, of_sae):
    url, run = f"{remote}/acts", tmp_path / "run"
    command = ["harvest", url, "--model", causal, "--texts", texts, "--context", 16, "--holdout-rows", 4, *place]
    assert main([str(part) for part in command]) == 0
    assert f"into {url}" in capsys.readouterr().out
    assert main(["train", url, str(run), *of_sae, *TRAINING]) == 0
    assert main(["evaluate", str(run), url, "--model", str(causal), "--splice-rows", "2", "--quiet"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert ("ce_spliced_layers" in found) == ("--beside" in place)
    assert "ce_spliced" in found
    assert main([*map(str, command), "--context", "12"]) == 1
    assert "was harvested with --context 16, this call has --context 12" in capsys.readouterr().err
