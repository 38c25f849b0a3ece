"""What the libraries compute of the files that they publish, and what an InferenceSAE read from them does."""

import json

import pytest
import torch
from dictionary_learning.utils import load_dictionary
from published_makers import (
    ARCHITECTURES,
    DICTIONARIES,
    SAELENS_3,
    D,
    F,
    write_dictionary_learning,
    write_gemma_scope,
    write_qwen_scope,
    write_saelens,
    write_sparsify,
    x,
)
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

from sampled_sae.formats.portable import silent
from sampled_sae.formats.published import load_inference, save_inference
from sampled_sae.impl.interface import HAS_TRITON

NEAR = {"rtol": 1e-4, "atol": 1e-5}
# (implementation, screen); the kernels in Triton's interpreter
FORMS = [("reference", "off"), ("torch", "off"), ("torch", "bf16"), *([("triton", "off")] if HAS_TRITON else [])]


def assert_same(theirs, reconstruction, ours, tokens, least=1):
    """The same entries active, values and reconstructions the same up to rounding."""
    output = ours(tokens)
    codes = output.codes.to_dense()
    assert torch.equal(codes != 0, theirs != 0)
    assert codes.count_nonzero() >= least
    torch.testing.assert_close(codes, theirs, **NEAR)
    torch.testing.assert_close(output.x_hat, reconstruction, **NEAR)


def assert_as_saelens(folder, tokens=None, least=1, forms=(("auto", "auto"),)):
    theirs = SAE.load_from_disk(folder)
    tokens = x() if tokens is None else tokens
    with torch.no_grad():
        for impl, screen in forms:
            ours = load_inference(folder, impl=impl, screen=screen, say=silent)
            assert_same(theirs.encode(tokens), theirs(tokens), ours, tokens, least)
    return theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_of_saelens(tmp_path, architecture):
    folder = write_saelens(tmp_path / "a", architecture)
    assert_as_saelens(folder, forms=FORMS)
    ours = load_inference(folder, say=silent)
    save_inference(ours, tmp_path / "b", to="saelens")
    back = load_inference(tmp_path / "b", say=silent)
    assert back.cfg == ours.cfg
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), back.buffers(), strict=True))
    assert_as_saelens(tmp_path / "b")


@pytest.mark.parametrize("threshold", ["zero", "huge", "-inf", "inf", "below zero"])
@pytest.mark.parametrize("architecture", ["jumprelu", "jumprelu_skip_transcoder"])
def test_thresholds_that_a_rule_has_to_get_right(tmp_path, architecture, threshold):
    none = threshold in ("huge", "inf")
    assert_as_saelens(write_saelens(tmp_path, architecture, threshold), least=0 if none else 1, forms=FORMS)


def test_ties_at_the_threshold(tmp_path):
    """Whole numbers, whose sums are exact: what equals its threshold is active nowhere."""
    folder = write_saelens(tmp_path, "jumprelu")
    g, path = torch.Generator().manual_seed(0), folder / "sae_weights.safetensors"
    tensors = {name: torch.randint(-2, 3, t.shape, generator=g).float() for name, t in load_file(path).items()}
    tensors["threshold"] = torch.randint(0, 4, (F,), generator=g).float()
    save_file(tensors, path)
    tokens = torch.randint(-2, 3, (40, D), generator=g).float()
    theirs = assert_as_saelens(folder, tokens, forms=FORMS)
    a = (tokens - theirs.b_dec) @ theirs.W_enc + theirs.b_enc
    assert ((a == theirs.threshold) & (a > 0)).sum() > 100


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
        ("gated", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
        ("transcoder", {"normalize_activations": "layer_norm"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_conventions_of_saelens(tmp_path, architecture, changes):
    assert_as_saelens(write_saelens(tmp_path, architecture, **changes))


def test_files_from_before_release_6(tmp_path):
    assert_as_saelens(write_saelens(tmp_path / "standard", "standard", config=SAELENS_3))
    old = {**SAELENS_3, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    assert_as_saelens(write_saelens(tmp_path / "topk", "topk", config=old))
    with_hook_z = {**SAELENS_3, "hook_name": "blocks.8.attn.hook_z"}
    theirs = SAE.load_from_disk(write_saelens(tmp_path / "z", "standard", config=with_hook_z))
    heads = x().view(-1, 3, D // 3)
    said = []
    ours = load_inference(tmp_path / "z", say=said.append)
    torch.testing.assert_close(ours.encode(heads.flatten(1)), theirs.encode(heads), **NEAR)
    assert any("hook_z" in line for line in said)


def test_a_saved_saelens_sae_is_the_file_that_the_fixture_writes(tmp_path):
    folder = write_saelens(tmp_path / "a", "jumprelu")
    SAE.load_from_disk(folder).save_model(tmp_path / "b")
    written = json.loads((folder / "cfg.json").read_text())
    saved = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert {name: saved[name] for name in written if name != "metadata"} | {"metadata": written["metadata"]} == written
    assert_as_saelens(tmp_path / "b")


@pytest.mark.parametrize("repository", ["gemma-scope-2b-pt-res", "gemma-scope-2b-pt-transcoders"])
def test_gemma_scope_as_saelens_reads_it(tmp_path, monkeypatch, repository):
    folder = write_gemma_scope(tmp_path, repository)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **kwargs: str(folder / "params.npz"))
    read = loaders.gemma_2_transcoder_huggingface_loader
    if repository.endswith("res"):
        read = loaders.gemma_2_sae_huggingface_loader
    config, state, _ = read(f"google/{repository}", "layer_12/width_16k/average_l0_82", "cpu", False, {})
    config = loaders.handle_config_defaulting({**config, "d_in": D, "d_sae": F, "d_out": D})
    theirs = SAE.from_dict(config)
    theirs.load_state_dict(state)
    said = []
    ours = load_inference(folder, say=said.append)
    with torch.no_grad():
        assert_same(theirs.encode(x()), theirs(x()), ours, x())
    assert f"layer 12 ({config['metadata']['hook_name']})" in said[-1]
    assert config["metadata"]["model_name"] in said[-1]


def test_qwen_scope_as_saelens_reads_it(tmp_path, monkeypatch):
    folder = write_qwen_scope(tmp_path)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **kwargs: str(folder / "layer3.sae.pt"))
    config, state, _ = loaders.qwen_scope_sae_huggingface_loader(f"Qwen/{folder.name}", "layer3.sae.pt", "cpu")
    theirs = SAE.from_dict(loaders.handle_config_defaulting({**config, "d_in": D, "d_sae": F}))
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert_same(theirs.encode(x()), theirs(x()), load_inference(folder, say=silent), x())


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True), (False, True)])
def test_sparsify(tmp_path, transcode, skip):
    folder = write_sparsify(tmp_path / "run", transcode, skip)
    ours = load_inference(folder, say=silent)
    save_inference(ours, tmp_path / "again" / folder.name, to="sparsify")
    for place in (folder, tmp_path / "again" / folder.name):
        theirs = SparseCoder.load_from_disk(place)
        with torch.no_grad():
            values, indices, _ = theirs.encode(x())
            dense = torch.zeros(len(x()), F).scatter(1, indices, values)
            assert_same(dense, theirs(x()).sae_out, load_inference(place, say=silent), x())


@pytest.mark.parametrize("of", DICTIONARIES)
def test_dictionary_learning(tmp_path, of):
    folder = write_dictionary_learning(tmp_path, of)
    theirs, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        codes = theirs.encode(x())
        assert_same(codes, theirs.decode(codes), load_inference(folder, say=silent), x())
