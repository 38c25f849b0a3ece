"""Folders that the commands read and write, tiny; and a command run in this process."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from makers import make_sae, write_store
from word_models import save_word_llama

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae import cli as command_line
from sampled_sae.cli.errors import sentence
from sampled_sae.training import sweep_plots

# What a tiny run needs besides its folders; what stands behind replaces it.
SMALL = {
    "harvest": "--model {model} --texts {texts} --layer 1 --context 8 --holdout-rows 2 --tokens 64",
    "train": "--features 16 --k 2 --steps 2 --batch-size 16",
    "evaluate": "--model {model} --batch-size 32 --splice-rows 0",
    "sweep": "--model {model} --features 16 --k 2 --steps 1 --batch-size 16 --ls 2 --scores l2 --splice-rows 0",
    "encode": "--sae {sae}",
    "look": "--model {model} --contexts 2 --insist",
    "export": "--to saelens",
    "compare": "--out {new}",
    "check": "--quick --impl torch",
    "bench": "--d 4 --features 16 --batch 8 --k 2 --rounds 1 --seconds 1",
}
NAMES = ("store", "sae", "run", "peer", "model", "empty", "file", "broken", "missing", "new", "texts.jsonl")
NAMES += ("dl", "sparsify", "imported", "harvested", "swept", "encoded")
FOLDERS = {
    "harvest": ("new",),
    "train": ("store", "new"),
    "evaluate": ("sae", "store"),
    "sweep": ("store", "new"),
    "encode": ("store", "new"),
    "look": ("sae", "store"),
    "export": ("sae", "new"),
    "import": ("peer", "new"),
    "compare": ("sae", "run"),
    "verify": ("store",),
}
# a command may take so many bytes more than the process has: what is too large fails at once and harms nobody
MEMORY = 6 << 30


def make_places(root: Path) -> None:
    """A store, an SAE, a finished training, an SAE of SAELens, a model with texts, and what is none of these."""
    write_store(root / "store", n=(40, 30), n_holdout=24)
    sae = make_sae(torch.float32)
    sae.threshold.fill_(0.5)
    sae.threshold_steps.fill_(1)
    sae.save_pretrained(root / "sae")
    formats.export(sae, root / "peer", to="saelens")
    make_model(root)
    formats.export(sae, root / "dl", to="dictionary_learning")
    formats.export(sae, root / "sparsify", to="sparsify", inference="topk")
    for made in (
        "import {peer} {imported}",
        "harvest {harvested}",
        "sweep {store} {swept}",
        "encode {store} {encoded}",
    ):
        assert command_line.main(full(made, root)) == 0
    (root / "empty").mkdir()
    (root / "file").write_text("neither a folder nor JSON")
    (root / "broken").mkdir()
    for name in ("manifest.json", "config.json", "run.json", "cfg.json", "checkpoint.pt"):
        (root / "broken" / name).write_text("[" * 100_000)
    store = ActivationStore.open(root / "store")
    config = SampledSAEConfig(12, 16, 2.0)
    Trainer(config, TrainConfig(steps=2, batch_size=16), store, root / "run").run(progress=False)


def paths_in(root: Path) -> dict[str, str]:
    return {name.split(".")[0]: str(root / name) for name in NAMES}


def full(text: str, root: Path) -> list[str]:
    """A command line: the command's own folders where it names none, what makes it small, then its options."""
    name, *rest = text.split()
    given = list(itertools.takewhile(lambda part: not part.startswith("--"), rest))
    folders = given or [f"{{{folder}}}" for folder in FOLDERS.get(name, ())]
    line = [name, *folders, *SMALL.get(name, "").split(), *rest[len(given) :]]
    return [part.format(**paths_in(root)) for part in line]


def make_model(root: Path) -> None:
    save_word_llama(root / "model", [f"w{i}" for i in range(30)])
    lines = [json.dumps({"text": " ".join(f"w{(i * j) % 30}" for j in range(12))}) for i in range(40)]
    (root / "texts.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    make_places(root)
    return root


@pytest.fixture
def places(pristine, tmp_path, monkeypatch):
    """A function that makes a fresh copy of the places; nothing is fetched, memory is small."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sweep_plots, "save_figure", save_small)
    root = tmp_path / "places"
    copied = {}

    def fresh():
        if not copied:
            shutil.copytree(pristine, root)
        elif state_of(root) != copied:
            restore(root, pristine, copied)
        else:
            return root
        copied.clear()
        copied.update(state_of(root))
        return root

    monkeypatch.chdir(tmp_path)
    with limited_memory():
        yield fresh


def save_small(figure, path):
    """A plot of few pixels, whose parts may overlap: a sweep here takes no longer to draw than to train."""
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=10, format="png")
    return path


def restore(root, pristine, copied):
    """Makes of `root` a copy of `pristine` again, as `copied` says that it was: what has changed alone is written."""
    now = state_of(root)
    for path in sorted(now, reverse=True):
        if path not in copied or path.is_dir() != (pristine / path.relative_to(root)).is_dir():
            path.rmdir() if path.is_dir() else path.unlink()
    for path in sorted(copied):
        source = pristine / path.relative_to(root)
        if source.is_dir():
            path.mkdir(exist_ok=True)
        elif now.get(path) != copied[path]:
            shutil.copy2(source, path)


@contextmanager
def limited_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, threads = resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        torch.set_num_threads(threads)


def state_of(folder):
    """path -> when it was last written, and its size, of all that is below."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def contents(folder):
    """path -> bytes of every file below."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_one_sentence(line, root, capsys):
    """Runs a command line. A failure is said by this package, for users, and changes no file that was there."""
    before = contents(root)
    raised = []

    def heard(error, *rest):
        raised.append(error)
        return sentence(error, *rest)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "sentence", heard)
        try:
            status = command_line.main(line)
        except SystemExit as end:
            status = end.code
    said = capsys.readouterr()
    about = f"{' '.join(line)[:400]}\n{said.err}\n{raised}"
    assert status in (0, 1, 2, 130), about
    assert "Traceback" not in said.err or "--debug" in line, about
    assert "unexpected error" not in said.err, about
    for error in raised:
        if isinstance(error, (ValueError, TypeError)):
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            assert "sampled_sae" in where, f"raised in {where}: {about}"
    if status:
        assert said.err.strip() or said.out.strip(), about
        after = contents(root)
        changed = [str(path) for path in before if after.get(path) != before[path]]
        assert not changed, f"{changed}: {about}"
