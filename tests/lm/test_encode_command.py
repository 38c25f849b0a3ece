"""`sampled-sae encode` of stored activations and of a model over texts, and token places in a harvest."""

import json

import pytest
import torch
from cli_places import make_model
from published_makers import SAELENS_6, write_saelens
from safetensors.torch import load_file, save_file

from sampled_sae import ActivationStore, CodesStore, lm
from sampled_sae.cli import main
from sampled_sae.support.checksums import file_crc32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model of width 12, texts, and an SAE whose files name layer 1 of that model."""
    folder = tmp_path_factory.mktemp("encode")
    make_model(folder)
    metadata = {**SAELENS_6["metadata"], "model_name": str(folder / "model"), "hook_name": "blocks.1.hook_resid_post"}
    write_saelens(folder / "sae", "jumprelu", metadata=metadata)
    return folder


def run(*words):
    return main([str(word) for word in words])


TEXTS = ("--context", 8, "--tokens", 200)


@pytest.fixture
def acts(root, tmp_path):
    more = ("--model", root / "model", "--texts", root / "texts.jsonl", "--layer", 1, *TEXTS, "--quiet")
    assert run("harvest", tmp_path / "acts", *more, "--holdout-rows", 0) == 0
    return tmp_path / "acts"


def test_a_harvest_keeps_where_its_tokens_stand(root, acts):
    store = ActivationStore.open(acts)
    assert store.has_places
    x, places = store.token_shard(0)
    assert x.shape == (len(places.positions), 12)
    assert places.rows.dtype == places.token_rows.dtype == places.positions.dtype == torch.int32
    assert int(places.positions.min()) == 1  # position 0 is left out
    model, _ = lm.load_model(str(root / "model"))
    with torch.no_grad(), lm.capture(model, 1) as captured:
        model(input_ids=places.rows.long())
    expected = captured.value[places.token_rows.long(), places.positions.long()]
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(places.ids, places.rows[places.token_rows.long(), places.positions.long()])


def test_stores_and_models_give_the_same_codes(root, acts, tmp_path, capsys):
    assert run("encode", acts, tmp_path / "a", "--sae", root / "sae", "--quiet") == 0
    capsys.readouterr()
    more = ("--model", root / "model", "--texts", root / "texts.jsonl", *TEXTS)
    assert run("encode", tmp_path / "b", "--sae", root / "sae", *more) == 0
    said = capsys.readouterr().out
    assert "jumprelu of saelens, d_in=12" in said
    assert "Encodes layer 1 of" in said
    assert "tokens/s, " in said
    assert " in the SAE alone" in said
    a, b = (CodesStore.open(tmp_path / name) for name in "ab")
    assert a.tokens == b.tokens
    torch.testing.assert_close(a.codes(0).to_dense(), b.codes(0).to_dense(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(s, t) for s, t in zip(a.places(0), b.places(0), strict=True))
    feature = int(a.counts().argmax())
    found = a.top_contexts(feature, n=3)
    assert [context.ids for context in found] == [context.ids for context in b.top_contexts(feature, n=3)]
    assert all(context.ids[context.at] == int(a.places(0).ids[context.token]) for context in found)
    assert run("encode", tmp_path / "b", "--sae", root / "sae", *more) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert run("verify", tmp_path / "b") == 0


def test_model_and_layer_of_the_saes_files_are_taken(root, tmp_path):
    more = ("--texts", root / "texts.jsonl", *TEXTS, "--quiet")
    assert run("encode", tmp_path / "a", "--sae", root / "sae", *more) == 0
    assert CodesStore.open(tmp_path / "a").manifest["layer"] == 1


def failure(capsys, *words):
    capsys.readouterr()
    assert run(*words) == 1
    return capsys.readouterr().err


def test_what_does_not_belong_together(root, acts, tmp_path, capsys):
    out = tmp_path / "out"
    other = write_saelens(tmp_path / "other", "jumprelu")
    said = failure(capsys, "encode", acts, out, "--sae", other)
    assert "reads model pythia-160m, layer 5, and was given model" in said
    assert "insist with --insist" in said
    assert run("encode", acts, out, "--sae", other, "--insist", "--quiet") == 0
    assert "either a folder of activations or --texts" in failure(capsys, "encode", out, "--sae", other)
    both = ("encode", acts, out, "--sae", root / "sae", "--texts", root / "texts.jsonl")
    assert "texts.jsonl': not beside" in failure(capsys, *both)
    mlp = {**SAELENS_6["metadata"], "hook_name": "blocks.1.hook_mlp_out"}
    folder = write_saelens(tmp_path / "mlp", "jumprelu", metadata=mlp)
    more = ("--texts", root / "texts.jsonl", "--model", root / "model")
    said = failure(capsys, "encode", out, "--sae", folder, *more)
    assert "reads blocks.1.hook_mlp_out, which is not a block's output; give --layer" in said
    unnamed = write_saelens(tmp_path / "unnamed", "jumprelu", metadata={"sae_lens_version": "6.0.0"})
    assert "does not name its language model; give --model" in failure(
        capsys, "encode", out, "--sae", unnamed, "--texts", root / "texts.jsonl"
    )
    assert "names no layer; give --layer" in failure(capsys, "encode", out, "--sae", unnamed, *more)


@pytest.mark.parametrize(
    "option",
    [
        "--texts x.txt",
        "--model x",
        "--layer 1",
        "--tokens 100",
        "--context 128",
        "--seed 1",
        "--drop-tokens none",
        "--model-dtype bfloat16",
        "--model-device cpu",
        "--cache x",
    ],
)
def test_options_of_texts_do_not_go_with_activations(option, tmp_path, capsys):
    name = option.split()[0]
    said = failure(capsys, "encode", tmp_path, tmp_path / "out", "--sae", tmp_path / "sae", *option.split())
    assert said.startswith(f"sampled-sae encode: {name} ")
    assert "Path" not in said
    assert said.endswith(f": not beside {tmp_path}, which holds activations\n")


def test_a_store_of_an_earlier_version_has_no_places(root, acts, tmp_path, capsys):
    manifest = json.loads((acts / "manifest.json").read_text())
    entry = manifest["shards"][0]
    x = load_file(acts / entry["file"])["activations"]
    save_file({"activations": x}, acts / entry["file"])
    del entry["rows"]
    entry |= {"bytes": (acts / entry["file"]).stat().st_size, "crc32": file_crc32(acts / entry["file"])}
    (acts / "manifest.json").write_text(json.dumps(manifest))
    store = ActivationStore.open(acts)
    assert not store.has_places
    assert store.token_shard(0).places is None
    assert torch.equal(store.shard(0), x)
    assert run("encode", acts, tmp_path / "out", "--sae", root / "sae") == 0
    assert "contexts will be token numbers" in capsys.readouterr().out
    codes = CodesStore.open(tmp_path / "out")
    assert codes.top_contexts(int(codes.counts().argmax()), n=1)[0].ids == []
