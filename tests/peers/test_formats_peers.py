"""Converted files through the peers' own loaders, encode and decode; dictionary_learning's and sparsify's own saves."""

import json
from dataclasses import replace

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.utils import load_dictionary
from format_peers_makers import (
    NEAR,
    PEERS,
    RULES,
    SHAPES,
    assert_same_codes,
    disturbed,
    sparsify_codes,
    trained,
    under,
)
from makers import tokens
from sae_lens import SAE
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

from sampled_sae import formats


@torch.no_grad()
def check(sae, folder, to, inference, scale=1.0):
    """Exports, encodes and decodes by the peer, compares with the SAE."""
    formats.export(sae, folder, to=to, inference=inference, scale=scale)
    x = tokens(50, sae.cfg.d_in, dtype=sae.W_enc.dtype, seed=5)
    codes, x_hat = PEERS[to](folder, x / scale)
    expected = under(sae, inference).encode(x)
    assert_same_codes(codes, expected, scale)
    torch.testing.assert_close(x_hat.to(x.dtype) * scale, sae.decode(expected), **NEAR)


CASES = [*((to, "topk") for to in PEERS), ("saelens", "threshold"), ("dictionary_learning", "threshold")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("to", "inference"), CASES)
def test_their_encode_and_decode_are_ours(tmp_path, to, inference, rule, shape):
    check(trained(shape=shape, **RULES[rule]), tmp_path, to, inference)


@pytest.mark.parametrize("scale", [0.25, 0.37, 3.0])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("to", "inference"), CASES)
def test_scale_and_b_dec(tmp_path, to, inference, centred, scale):
    check(trained(l=None, apply_b_dec_to_input=centred), tmp_path, to, inference, scale)


@pytest.mark.parametrize("inference", ["threshold", "topk"])
def test_float64_in_saelens(tmp_path, inference):
    check(trained(torch.float64, l=None, select="token"), tmp_path, "saelens", inference)
    assert SAE.load_from_disk(tmp_path).W_enc.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("to", "inference"), CASES)
@torch.no_grad()
def test_16_bits(tmp_path, to, inference, centred, dtype):
    """The weights arrive as they are; computed in float32, all is that of the same SAE in float32."""
    sae = trained(dtype, l=None, select="token", apply_b_dec_to_input=centred)
    formats.export(sae, tmp_path, to=to, inference=inference)
    if to == "saelens":
        loaded = SAE.load_from_disk(tmp_path)
        assert loaded.W_enc.dtype == dtype
        assert torch.equal(loaded.W_enc, sae.W_enc)
    elif to == "sparsify":
        loaded = SparseCoder.load_from_disk(tmp_path)
        assert loaded.encoder.weight.dtype == dtype
        assert torch.equal(loaded.encoder.weight, sae.W_enc.t())
    x = tokens(50, 12, dtype=dtype, seed=5).float()
    codes, x_hat = PEERS[to](tmp_path, x)
    assert codes.dtype == x_hat.dtype == torch.float32
    ours = under(sae, inference).float()
    if not centred and to != "saelens":
        # b_dec W_enc went into a b_enc of 16 bits, which may carry an entry over the edge
        ours.b_enc.add_(ours.b_dec @ ours.W_enc)
        ours.b_enc.copy_(ours.b_enc.to(dtype))
        ours.cfg = replace(ours.cfg, apply_b_dec_to_input=True)
    expected = ours.encode(x)
    assert_same_codes(codes, expected)
    torch.testing.assert_close(x_hat, ours.decode(expected), **NEAR)


def test_dictionary_learning_has_both_rules_in_a_topk(tmp_path):
    sae = trained(l=None, select="token")
    formats.export(sae, tmp_path, to="dictionary_learning")
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    theirs = AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", device="cpu")
    assert_same_codes(theirs.encode(x), sae.eval().encode(x))
    by_threshold = sae.encode_above_threshold(x).to_dense()
    assert_same_codes(theirs.encode(x, use_threshold=True), by_threshold)
    theirs = BatchTopKSAE.from_pretrained(tmp_path / "ae.pt")
    assert_same_codes(theirs.encode(x), by_threshold)


def test_a_folder_of_hooks_in_sparsify(tmp_path):
    for layer in (3, 11):
        formats.export(trained(seed=layer), tmp_path / f"layers.{layer}", to="sparsify", inference="topk")
    coders = SparseCoder.load_many(str(tmp_path), local=True)
    assert list(coders) == ["layers.3", "layers.11"]
    assert torch.equal(coders["layers.11"].W_dec, trained(seed=11).W_dec)
    assert (coders["layers.3"].cfg.k, coders["layers.3"].cfg.normalize_decoder) == (4, False)


def dictionary_trainer(kind):
    sizes = {"activation_dim": 12, "dict_size": 96, "k": 4}
    return kind(steps=9, warmup_steps=1, layer=3, lm_name="org/model", device="cpu", seed=0, **sizes)


@pytest.mark.parametrize(("trainer", "rule"), [(BatchTopKTrainer, "threshold"), (TopKTrainer, "topk")])
@torch.no_grad()
def test_dictionary_learning_own_saves(tmp_path, trainer, rule):
    made = dictionary_trainer(trainer)
    disturbed(made.ae)
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    for folder, threshold in ((tmp_path / "set", 1.25), (tmp_path / "unset", -1.0)):
        made.ae.threshold.fill_(threshold)
        folder.mkdir()
        torch.save(made.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": made.config, "buffer": {}}))
        ours = under(formats.load(folder), rule)
        assert (ours.cfg.k, ours.cfg.select) == (4, "batch" if rule == "threshold" else "token")
        assert (float(ours.threshold), int(ours.threshold_steps)) == ((1.25, 1) if threshold > 0 else (0, 0))
        assert torch.equal(made.ae.encode(x) > 0, ours.encode(x) > 0)
        torch.testing.assert_close(made.ae.encode(x), ours.encode(x), **NEAR)
        torch.testing.assert_close(made.ae(x), ours.decode(ours.encode(x)), **NEAR)
        formats.export(ours, folder / "again", to="dictionary_learning")
        first, second = (torch.load(f / "ae.pt", weights_only=True) for f in (folder, folder / "again"))
        assert set(first) == set(second)
        for name in first:
            assert torch.equal(first[name], second[name])
            assert first[name].dtype == second[name].dtype
        again, config = load_dictionary(str(folder / "again"), "cpu")
        assert (type(again), config["trainer"]["dict_class"]) == (type(made.ae), made.config["dict_class"])


@pytest.mark.parametrize("trainer", [BatchTopKTrainer, TopKTrainer])
def test_an_older_file_without_threshold(tmp_path, trainer):
    made = dictionary_trainer(trainer)
    state = {name: t for name, t in made.ae.state_dict().items() if name not in ("threshold", "k")}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": made.config}))
    said = []
    assert formats.load(tmp_path, say=said.append).cfg.k == 4
    assert "call calibrate(x)" in said[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [{"num_latents": 96}, {"expansion_factor": 8}], ids=str)
@torch.no_grad()
def test_sparsify_own_saves(tmp_path, dtype, size):
    cfg = SparseCoderConfig(k=4, multi_topk=True, **size)
    theirs = disturbed(SparseCoder(12, cfg, dtype=dtype))
    theirs.save_to_disk(tmp_path / "theirs")
    ours = formats.load(tmp_path / "theirs")
    for name, value in (("W_enc", theirs.encoder.weight.t()), ("b_enc", theirs.encoder.bias)):
        assert torch.equal(getattr(ours, name), value)
    formats.export(ours, tmp_path / "again", to="sparsify")
    first, second = (load_file(tmp_path / f / "sae.safetensors") for f in ("theirs", "again"))
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name], second[name])
    x = tokens(50, 12, dtype=dtype, seed=5)
    if dtype == torch.float32:
        codes, x_hat = sparsify_codes(tmp_path / "theirs", x)
        assert_same_codes(codes, ours.encode(x))
        torch.testing.assert_close(x_hat, ours.decode(ours.encode(x)), **NEAR)


@pytest.mark.parametrize("change", [{"skip_connection": True}, {"activation": "groupmax"}], ids=str)
def test_sparsify_kinds_that_are_refused(tmp_path, change):
    SparseCoder(12, SparseCoderConfig(k=4, num_latents=96, **change)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=rf"cfg\.json: {next(iter(change))}="):
        formats.load(tmp_path)
