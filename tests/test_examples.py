"""The scripts in examples/, run as a reader runs them, with sizes for seconds."""

import json
import re
from pathlib import Path

import pytest
import torch
from forked import run_forked, script
from word_models import save_word_tokenizer

from sampled_sae import SampledSAE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_example(tmp_path_factory):
    """What a script prints; the figures of its last lines by name."""

    def run_it(name, *arguments):
        status, said = run_forked(tmp_path_factory.mktemp("said") / "log", script, ROOT / "examples" / name, *arguments)
        assert status == 0, said
        return said, {name: float(value) for name, value in re.findall(r"^(\w+): (\S+)$", said, re.MULTILINE)}

    return run_it


def test_train_on_tensor(run_example, tmp_path):
    sizes = ["--tokens", 2000, "--holdout", 256, "--d", 16, "--features", 64, "--k", 4, "--steps", 60]
    arguments = ["--out", tmp_path, *sizes, "--batch-size", 128]
    _, figures = run_example("train_on_tensor.py", *arguments)
    assert figures["tokens"] == 256
    assert 0 < figures["fvu"] < 1
    assert SampledSAE.from_pretrained(tmp_path / "sae").cfg.d_in == 16
    assert run_example("train_on_tensor.py", *arguments)[1] == figures, "the second start goes on from the first's end"


@pytest.mark.slow
def test_train_on_model(run_example, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = [f"w{i}" for i in range(40)]
    folder = tmp_path / "model"
    save_word_tokenizer(folder, words)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=42, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    order = torch.randint(0, 40, (60, 30)).tolist()
    texts.write_text("".join(json.dumps({"text": " ".join(words[i] for i in line)}) + "\n" for line in order))

    sizes = ["--layer", 1, "--rows", 60, "--context", 16, "--holdout-rows", 8, "--features", 64, "--k", 3]
    arguments = ["--model", folder, "--texts", texts, "--out", tmp_path / "out", *sizes, "--steps", 40]
    _, figures = run_example("train_on_model.py", *arguments, "--batch-size", 128)
    assert {"fvu", "l0", "dead_share", "ce_clean", "ce_spliced", "ce_zero", "loss_recovered_zero"} == set(figures)
    assert 0 < figures["fvu"] < 1
    assert SampledSAE.from_pretrained(tmp_path / "out" / "sae").cfg.d_in == 16


@pytest.mark.slow
def test_model_diffing(run_example, tmp_path):
    """The tuned model writes something new in the second half of each row, whatever the word; it alone has that."""
    transformers = pytest.importorskip("transformers")
    words = [f"w{i}" for i in range(40)]
    config = transformers.GPT2Config(vocab_size=42, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.wte.weight.data *= 20
    for name in ("base", "tuned"):
        save_word_tokenizer(tmp_path / name, words)
        model.save_pretrained(tmp_path / name)
        model.transformer.wpe.weight.data[8:] += 3 * torch.nn.functional.normalize(torch.randn(16), dim=0)
    texts = tmp_path / "texts.jsonl"
    order = torch.randint(0, 40, (120, 30)).tolist()
    texts.write_text("".join(json.dumps({"text": " ".join(words[i] for i in line)}) + "\n" for line in order))

    models = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--texts", texts, "--layer", 0]
    sizes = ["--rows", 200, "--context", 16, "--holdout-rows", 8, "--features", 64, "--k", 3, "--steps", 300]
    more = ["--batch-size", 128, "--lr", 1e-2, "--out", tmp_path / "out"]
    printed, figures = run_example("model_diffing.py", *models, *sizes, *more)
    assert {"fvu_base", "fvu_tuned", "base_only", "tuned_only", "shared", "cosine_of_shared"} == set(figures)
    assert figures["fvu_base"] < 0.5 > figures["fvu_tuned"]
    assert figures["base_only"] == 0 < figures["tuned_only"] < figures["shared"]
    assert figures["cosine_of_shared"] > 0.5
    assert re.search(r"feature \d+ of the tuned model: active on \d+ tokens, most on 'w\d+'", printed)
    assert SampledSAE.from_pretrained(tmp_path / "out" / "crosscoder").cfg.layers == 2


def test_kernels_alone(run_example):
    printed, _ = run_example("kernels_alone.py", "--d", 16, "--features", 64, "--batch-size", 64, "--steps", 60)
    assert printed.count("as specified") == 4
    lost = [float(share) for share in re.findall(r"lost (\S+),", printed)]
    assert lost[-1] < lost[0]
