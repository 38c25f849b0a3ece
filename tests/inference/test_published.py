"""SAEs as the field publishes them, read as an InferenceSAE: formulas, one line, dtypes, the hub."""

import builtins
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import make_sae
from published_makers import (
    ARCHITECTURES,
    DICTIONARIES,
    SAELENS_3,
    SAELENS_6,
    Hub,
    saelens_tensors,
    thresholds,
    weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_qwen_scope,
    write_saelens,
    write_sparsify,
    x,
)
from safetensors.torch import load_file, save_file

import sampled_sae
from sampled_sae import formats, load_inference
from sampled_sae.formats.portable import silent
from sampled_sae.formats.published import LAYOUTS, detect, read_inference, save_inference

NEAR = {"rtol": 1e-5, "atol": 1e-5}


def line_of(*args, **options):
    said = []
    load_inference(*args, **options, say=said.append)
    return said[-1]


def assert_jumprelu(folder, threshold):
    w = weights()
    a = x() @ w["W_enc"] + w["b_enc"]
    codes = torch.where((a > threshold) & (a > 0), a, 0)
    output = load_inference(folder, say=silent)(x())
    torch.testing.assert_close(output.codes.to_dense(), codes, **NEAR)
    torch.testing.assert_close(output.x_hat, codes @ w["W_dec"] + w["b_dec"], **NEAR)


def test_gemma_scope(tmp_path):
    folder = write_gemma_scope(tmp_path)
    assert_jumprelu(folder, thresholds())
    assert line_of(folder) == (
        f"{folder}: JumpReLU SAE of gemma_scope, d_in=12, d_sae=96, jumprelu, float32; model google/gemma-2-2b, "
        "layer 12 (blocks.12.hook_resid_post); activations times 1"
    )
    assert line_of(tmp_path, "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82").startswith(f"{tmp_path}/gemma")


def test_gemma_scope_transcoders(tmp_path):
    folder = write_gemma_scope(tmp_path, "gemma-scope-9b-it-transcoders", d_out=10)
    assert "transcoder of gemma_scope, d_in=12, d_sae=96, d_out=10" in line_of(folder)
    assert "model google/gemma-2-9b-it, layer 12 (blocks.12.ln2.hook_normalized)" in line_of(folder)
    assert load_inference(folder, say=silent)(x()).x_hat.shape == (40, 10)


def test_gemma_scope_2(tmp_path):
    folder = write_gemma_scope_2(tmp_path / "a")
    assert_jumprelu(folder, thresholds())
    assert "google/gemma-3-270m, layer 5 (model.layers.5.output)" in line_of(folder)
    config = json.loads((folder / "config.json").read_text())
    for said, model in (("gemma-v3-270m-pt", "google/gemma-3-270m"), ("gemma-v3-1b-it", "google/gemma-3-1b-it")):
        (folder / "config.json").write_text(json.dumps({**config, "model_name": said, "hf_hook_point_out": None}))
        assert f"JumpReLU SAE of gemma_scope_2, d_in=12, d_sae=96, jumprelu, float32; model {model}," in line_of(folder)
    (folder / "config.json").unlink()
    assert "model google/gemma-3-270m, layer 5" in line_of(folder)
    folder = write_gemma_scope_2(tmp_path / "b", skip=True)
    ours = load_inference(folder, say=silent)
    tensors = load_file(folder / "params.safetensors")
    without = ours.decode(ours.encode_sparse(x()))
    torch.testing.assert_close(ours(x()).x_hat, without + x() @ tensors["affine_skip_connection"], **NEAR)
    across = {**tensors, "w_dec": tensors["w_dec"].unsqueeze(1)}
    save_file(across, folder / "params.safetensors")
    with pytest.raises(ValueError, match="a transcoder across layers has no place here"):
        load_inference(folder)


def test_qwen_scope(tmp_path):
    folder = write_qwen_scope(tmp_path)
    assert "TopK SAE of qwen_scope, d_in=12, d_sae=96, k=5" in line_of(folder)
    assert "model Qwen/Qwen3-1.7B-Base, layer 3" in line_of(folder, "layer3.sae.pt")
    assert load_inference(folder, k=7, say=silent).cfg.k == 7
    elsewhere = write_qwen_scope(tmp_path, "mine")
    with pytest.raises(ValueError, match="does not say k"):
        load_inference(elsewhere)
    (folder / "layer4.sae.pt").write_bytes((folder / "layer3.sae.pt").read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 SAEs, layer3.sae.pt, layer4.sae.pt: name one with at"):
        load_inference(folder)


def test_sparsify_names_model_and_hook(tmp_path):
    line = line_of(write_sparsify(tmp_path / "a"))
    assert "SAE of sparsify, d_in=12, d_sae=96, k=5, float32; model EleutherAI/pythia-160m, layer 5 (layers.5)" in line
    assert "skip transcoder of sparsify" in line_of(write_sparsify(tmp_path / "b", transcode=True, skip=True))


@pytest.mark.parametrize("of", DICTIONARIES)
def test_dictionary_learning(tmp_path, of):
    line = line_of(write_dictionary_learning(tmp_path, of))
    assert f"{of} of dictionary_learning, d_in=12, d_sae=96" in line
    assert "model EleutherAI/pythia, layer 4" in line


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens(tmp_path, architecture):
    line = line_of(write_saelens(tmp_path, architecture))
    assert f"{architecture} of saelens, d_in=12, d_sae=96" in line
    assert "model pythia-160m, layer 5 (blocks.5.hook_resid_post)" in line


def test_saelens_before_release_6(tmp_path):
    assert "standard of saelens" in line_of(write_saelens(tmp_path, "standard", config=SAELENS_3))
    assert "model gpt2-small, layer 8 (blocks.8.hook_resid_pre)" in line_of(tmp_path)
    k_inside = {**SAELENS_3, "architecture": "topk", "activation_fn_kwargs": {"k": 7}}
    assert "topk of saelens" in line_of(write_saelens(tmp_path, "topk", config=k_inside))
    assert load_inference(tmp_path, say=silent).cfg.k == 7


@pytest.mark.parametrize("select", ["batch", "token"])
def test_ours(tmp_path, select):
    sae = make_sae(torch.float32, l=None, select=select, input_scale=0.5).eval()
    sae.calibrate(x(), 4)
    sae.save_pretrained(tmp_path)
    (tmp_path / "origin.json").write_text(json.dumps({"model_name": "m", "layer": 3}))
    ours = load_inference(tmp_path, say=silent)
    torch.testing.assert_close(ours.encode(x()), sae.encode(x()), **NEAR)
    torch.testing.assert_close(ours(x()).x_hat, sae(x()).x_hat, **NEAR)
    assert "of sampled-sae" in line_of(tmp_path)
    assert "model m, layer 3; activations times 0.5" in line_of(tmp_path)


def test_a_training_checkpoint_of_saelens(tmp_path):
    """Decoder norms are folded in, as SAELens does when it saves for inference."""
    config = {**SAELENS_6, "architecture": "batchtopk", "k": 4.0}
    save_file(
        {**saelens_tensors("standard"), "topk_threshold": torch.tensor(0.5)}, tmp_path / "sae_weights.safetensors"
    )
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    w = weights()
    a = ((x() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() * w["W_dec"].norm(dim=1)
    expected = torch.where(a > 0.5, a, 0)
    torch.testing.assert_close(load_inference(tmp_path, say=silent).encode(x()), expected, **NEAR)


def test_dtypes(tmp_path):
    folder = write_saelens(tmp_path, "jumprelu")
    tensors = {name: t.bfloat16() if name == "W_enc" else t for name, t in saelens_tensors("jumprelu").items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    said = []
    sae = load_inference(folder, say=said.append)
    assert {t.dtype for t in sae.buffers()} == {torch.float32}
    assert "several dtypes are taken in torch.float32, which loses nothing" in said[0]
    assert load_inference(folder, dtype=torch.bfloat16, say=silent).W_dec.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"dtype=torch.int8"):
        load_inference(folder, dtype=torch.int8)


def test_weights_of_16_bits_leave_biases_and_thresholds_exact(tmp_path):
    exact = load_inference(write_saelens(tmp_path / "a"), say=silent)
    sae = load_inference(tmp_path / "a", dtype=torch.bfloat16, say=silent)
    assert torch.equal(sae.threshold, exact.threshold)
    assert torch.equal(sae.b_enc, exact.b_enc)
    save_inference(sae, tmp_path / "b", to="saelens")
    back = load_inference(tmp_path / "b", say=silent)
    assert back.W_enc.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(sae.buffers(), back.buffers(), strict=True))


@pytest.mark.parametrize(("to", "architecture"), [("sparsify", "jumprelu"), ("gemma_scope", "standard")])
def test_a_layout_refuses_what_it_cannot_hold(tmp_path, to, architecture):
    sae = load_inference(write_saelens(tmp_path / "a", architecture), say=silent)
    with pytest.raises(ValueError, match="files have no place for it"):
        save_inference(sae, tmp_path / "b", to=to)
    assert not (tmp_path / "b").exists()
    by_norm = sampled_sae.InferenceSAE(replace(sae.cfg, scale_by_decoder_norm=True), dict(sae.named_buffers()))
    with pytest.raises(ValueError, match="scale_by_decoder_norm=True: SAELens' files have no place for it"):
        save_inference(by_norm, tmp_path / "b", to="saelens")
    with pytest.raises(ValueError, match="holds an SAE in the layout 'saelens'"):
        save_inference(sae, tmp_path / "a", to=to)


@pytest.mark.parametrize("layout", ["saelens", "gemma_scope", "sparsify"])
def test_round_trips(tmp_path, layout):
    folder = {
        "saelens": lambda: write_saelens(tmp_path / "a"),
        "gemma_scope": lambda: write_gemma_scope(tmp_path),
        "sparsify": lambda: write_sparsify(tmp_path / "run"),
    }[layout]()
    found = read_inference(folder, say=silent)
    again = tmp_path / "again"
    written = save_inference(found.sae, again, to=layout, origin=found.origin)
    assert written == [again / name for name in LAYOUTS[layout].files]
    assert detect(again) == layout
    back = read_inference(again, say=silent)
    assert back.sae.cfg == found.sae.cfg
    assert all(torch.equal(a, b) for a, b in zip(found.sae.buffers(), back.sae.buffers(), strict=True))
    if layout == "saelens":
        assert back.origin == found.origin
    file = LAYOUTS[layout].files[0]
    before, after = (np.load(f / file) if layout == "gemma_scope" else load_file(f / file) for f in (folder, again))
    for name in before:
        assert np.array_equal(np.asarray(before[name]), np.asarray(after[name])), name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    monkeypatch.chdir(tmp_path)
    return made


def test_the_hub(tmp_path, hub):
    write_gemma_scope(tmp_path / "hub" / "google")
    at = "layer_12/width_16k/average_l0_82"
    line = line_of("google/gemma-scope-2b-pt-res", at, revision="abc")
    assert line.startswith(f"google/gemma-scope-2b-pt-res/{at}: JumpReLU SAE of gemma_scope")
    assert hub.asked == [("google/gemma-scope-2b-pt-res", "abc")]
    assert [f.name for f in hub.cache.rglob("*") if f.is_file()] == ["params.npz"]
    load_inference("google/gemma-scope-2b-pt-res", at + "/", say=silent)
    assert not any(pattern.endswith("/") for pattern in hub.patterns)
    write_qwen_scope(tmp_path / "hub" / "Qwen", "SAE-Res-Qwen3-8B-Base-W64K-L0_50")
    line = line_of("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer3.sae.pt")
    assert "k=50, float32; model Qwen/Qwen3-8B-Base, layer 3" in line
    write_sparsify(tmp_path / "hub" / "EleutherAI" / "sae-pythia")
    assert "model EleutherAI/pythia-160m, layer 5" in line_of("EleutherAI/sae-pythia", "layers.5")
    write_saelens(tmp_path / "hub" / "me" / "sae")
    assert "jumprelu of saelens" in line_of("me/sae")
    sampled_sae.load_inference("me/sae", say=silent)


def test_the_cache_of_the_hub_without_a_network(tmp_path, monkeypatch):
    """By huggingface_hub itself, from files that it has fetched before."""
    constants = pytest.importorskip("huggingface_hub.constants")
    at = "layer_12/width_16k/average_l0_82"
    made = write_gemma_scope(tmp_path)
    repository = tmp_path / "cache" / "models--google--gemma-scope-2b-pt-res"
    target = repository / "snapshots" / ("0" * 40) / at
    target.parent.mkdir(parents=True)
    made.rename(target)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert "model google/gemma-2-2b, layer 12" in line_of("google/gemma-scope-2b-pt-res", at)
    with pytest.raises(ValueError, match=r"^google/gemma-scope-9b-pt-res: the hub did not give it"):
        load_inference("google/gemma-scope-9b-pt-res", at)


def test_a_hub_that_gives_nothing(tmp_path, hub):
    with pytest.raises(
        ValueError, match=r"^no/such: the hub did not give it \(OSError: 404 Client Error\), and there is"
    ):
        load_inference("no/such")
    write_gemma_scope(tmp_path / "hub" / "google")
    (tmp_path / "cache" / "google" / "gemma-scope-2b-pt-res").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no SAE in a known layout.*In a folder of many SAEs name one with at="):
        load_inference("google/gemma-scope-2b-pt-res")
    with pytest.raises(ValueError, match=r"google/gemma-scope-2b-pt-res/layer_1: no such folder or file"):
        load_inference("google/gemma-scope-2b-pt-res", "layer_1")


def test_the_hub_needs_an_extra(monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r'pip install "sampled-sae\[hub\]", or download the files'):
        load_inference("google/gemma-scope-2b-pt-res")


def test_an_exported_sae_of_ours_is_read_as_the_peer_has_it(tmp_path):
    sae = make_sae(torch.float32, l=None)
    sae.calibrate(x(), 4)
    for to in ("saelens", "dictionary_learning"):
        formats.export(sae, tmp_path / to, to=to)
        torch.testing.assert_close(
            load_inference(tmp_path / to, say=silent).encode(x()), sae.eval().encode(x()), **NEAR
        )
