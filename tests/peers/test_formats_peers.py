"""Converted files through the peers' own loaders, encode and decode; the peers' own saves through ours."""

import json
from dataclasses import replace

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.utils import load_dictionary
from makers import make_sae, tokens
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

from sampled_sae import formats

RULES = {"l=1": {"l": 1.0}, "l=4": {"l": 4.0}, "batchtopk": {"l": None}, "topk": {"l": None, "select": "token"}}
# (d_in, d_sae, k)
SHAPES = [(12, 96, 4), (37, 301, 7)]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def trained(dtype=torch.float32, shape=SHAPES[0], **rule):
    """Calibrated, with decoder rows away from unit norm."""
    d_in, d_sae, k = shape
    sae = make_sae(dtype, d_in=d_in, d_sae=d_sae, k=k, **rule)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, d_sae).to(dtype).unsqueeze(1))
    sae.calibrate(tokens(300, d_in, dtype=dtype, seed=7))
    return sae


def under(sae, inference):
    """Set to compute what a peer's inference does: k of each token, as in a TopK's training, or the threshold."""
    if inference == "topk":
        sae.cfg = replace(sae.cfg, l=None, select="token")
    return sae.train(inference == "topk")


def assert_same_codes(theirs, ours, scale=1.0):
    """The same entries active, the same values up to rounding."""
    assert theirs.shape == ours.shape
    assert 0 < (ours > 0).sum() < ours.numel() / 4
    assert torch.equal(theirs > 0, ours > 0)
    torch.testing.assert_close(theirs.to(ours.dtype) * scale, ours, **NEAR)


def saelens_codes(folder, x, **options):
    sae = SAE.load_from_disk(folder, **options)
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def dictionary_learning_codes(folder, x):
    sae, _ = load_dictionary(str(folder), "cpu")
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def sparsify_codes(folder, x):
    sae = SparseCoder.load_from_disk(folder)
    values, indices, _ = sae.encode(x)
    codes = torch.zeros(len(x), sae.num_latents, dtype=values.dtype).scatter(1, indices, values)
    return codes, sae.decode(values, indices)


PEERS = {"saelens": saelens_codes, "dictionary_learning": dictionary_learning_codes, "sparsify": sparsify_codes}


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
@pytest.mark.parametrize("to", PEERS)
@torch.no_grad()
def test_16_bits(tmp_path, to, dtype):
    """The weights arrive as they are; computed in float32, codes are those of the same SAE in float32."""
    sae = trained(dtype, l=None, select="token")
    formats.export(sae, tmp_path, to=to)
    x = tokens(50, 12, dtype=dtype, seed=5).float()
    if to == "sparsify":
        coder = SparseCoder.load_from_disk(tmp_path)
        assert coder.W_dec.dtype == dtype
        assert torch.equal(coder.encoder.weight, sae.W_enc.t())
        return
    codes, _ = PEERS[to](tmp_path, x, **({"dtype": "float32"} if to == "saelens" else {}))
    assert_same_codes(codes, under(sae, "topk").float().encode(x))
    if to == "saelens":
        assert SAE.load_from_disk(tmp_path).W_dec.dtype == dtype
        sae = trained(dtype)
        formats.export(sae, tmp_path, to=to)
        codes, _ = saelens_codes(tmp_path, x, dtype="float32")
        assert_same_codes(codes, sae.eval().float().encode(x))


def test_dictionary_learning_has_both_rules_in_a_topk(tmp_path):
    sae = trained(l=None, select="token")
    formats.export(sae, tmp_path, to="dictionary_learning")
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    theirs = AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", device="cpu")
    assert_same_codes(theirs.encode(x), sae.train().encode(x))
    assert_same_codes(theirs.encode(x, use_threshold=True), sae.eval().encode(x))
    theirs = BatchTopKSAE.from_pretrained(tmp_path / "ae.pt")
    assert_same_codes(theirs.encode(x), sae.eval().encode(x))


def test_what_saelens_reads_of_the_configuration(tmp_path):
    origin = formats.Origin("org/model", layer=5, context_size=64)
    formats.export(trained(), tmp_path, to="saelens", origin=origin)
    cfg = SAE.load_from_disk(tmp_path).cfg
    assert (cfg.architecture(), cfg.d_in, cfg.d_sae, cfg.dtype) == ("jumprelu", 12, 96, "float32")
    assert (cfg.apply_b_dec_to_input, cfg.normalize_activations) == (True, "none")
    assert (cfg.metadata.model_name, cfg.metadata.hook_name) == ("org/model", "blocks.5.hook_resid_post")
    assert (cfg.metadata.context_size, cfg.metadata.training_architecture) == (64, "sampled_sae")


def test_a_folder_of_hooks_in_sparsify(tmp_path):
    for layer in (3, 11):
        formats.export(trained(seed=layer), tmp_path / f"layers.{layer}", to="sparsify", inference="topk")
    coders = SparseCoder.load_many(str(tmp_path), local=True)
    assert list(coders) == ["layers.3", "layers.11"]
    assert torch.equal(coders["layers.11"].W_dec, trained(seed=11).W_dec)
    assert (coders["layers.3"].cfg.k, coders["layers.3"].cfg.normalize_decoder) == (4, False)


def test_what_saelens_writes_again_is_still_whole(tmp_path):
    """Loaded and saved in place by the peer, the configuration of ours is still found."""
    sae = trained(l=2.0, score="entropy")
    formats.export(sae, tmp_path, to="saelens")
    SAE.load_from_disk(tmp_path).save_model(tmp_path)
    assert formats.load(tmp_path).cfg == sae.cfg


def disturbed(module, seed=0, width=0.3):
    """Every parameter away from its initial value, decoder norms away from 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(width * torch.randn(p.shape, generator=g).to(p.dtype))
    return module


def saelens_sae(name, dtype="float32", **options):
    common = {"d_in": 12, "d_sae": 96, "dtype": dtype, "decoder_init_norm": 1.0}
    if name == "jumprelu":
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, jumprelu_init_threshold=1.7))
        threshold = sae.threshold.data.clone()
        disturbed(sae).threshold.data = threshold
        return sae
    if name == "topk":
        return disturbed(TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=4, **options)))
    if name == "matryoshka":
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(**common, k=4.5, matryoshka_widths=[32, 96], **options)
        sae = disturbed(MatryoshkaBatchTopKTrainingSAE(cfg))
    else:
        sae = disturbed(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=4.5, **options)))
    sae.topk_threshold.fill_(2.0 if dtype != "float32" else 2.0123456789)
    return sae


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka", "topk"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@torch.no_grad()
def test_saelens_own_saves(tmp_path, name, rescale, dtype):
    theirs = saelens_sae(name, dtype, rescale_acts_by_decoder_norm=rescale)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    inference = SAE.load_from_disk(tmp_path / "inference")
    x = tokens(50, 12, dtype=getattr(torch, dtype), seed=5)
    expected = inference.encode(x)
    rule = "topk" if name == "topk" else "threshold"
    for stage in ("inference", "training"):
        ours = under(formats.load(tmp_path / stage), rule)
        assert ours.cfg.k == (4 if name == "topk" else 4.5)
        assert_same_codes(expected, ours.encode(x))
        torch.testing.assert_close(inference.decode(expected), ours.decode(ours.encode(x)), **NEAR)
        formats.export(ours, tmp_path / f"again {stage}", to="saelens")
        first, second = (load_file(tmp_path / f / "sae_weights.safetensors") for f in ("inference", f"again {stage}"))
        assert set(first) == set(second)
        for tensor in first:
            assert torch.equal(first[tensor], second[tensor])
            assert first[tensor].dtype == second[tensor].dtype
    if rule == "topk":
        assert_same_codes(theirs.encode(x), ours.encode(x))


@torch.no_grad()
def test_a_topk_of_saelens_saved_before_folding(tmp_path):
    """An inference TopK with rescale_acts_by_decoder_norm=True selects by activation times decoder norm."""
    theirs = saelens_sae("topk")
    theirs.save_inference_model(tmp_path)
    inference = SAE.load_from_disk(tmp_path)
    inference.W_dec.mul_(torch.linspace(0.3, 3, 96).unsqueeze(1))
    inference.cfg.rescale_acts_by_decoder_norm = True
    inference.save_model(tmp_path)
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    ours, expected = formats.load(tmp_path), inference.encode(x)
    assert_same_codes(expected, ours.encode(x))
    torch.testing.assert_close(inference.decode(expected), ours.decode(ours.encode(x)), **NEAR)


@torch.no_grad()
def test_a_jumprelu_of_saelens(tmp_path):
    theirs = saelens_sae("jumprelu")
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    theirs.save_inference_model(tmp_path / "one")
    ours = formats.load(tmp_path / "one", k=4).eval()
    assert_same_codes(theirs.encode(x), ours.encode(x))
    # unfolding the norms that SAELens folds into the thresholds changes the units of the codes alone
    inference = SAE.load_from_disk(tmp_path / "one", fold_W_dec_norm=True)
    inference.save_model(tmp_path / "folded")
    with pytest.raises(ValueError, match="threshold of each feature"):
        formats.load(tmp_path / "folded", k=4)
    unfolded = formats.load(tmp_path / "folded", k=4, rescale_features=True).eval()
    assert torch.equal(unfolded.encode(x) > 0, ours.encode(x) > 0)
    torch.testing.assert_close(unfolded.decode(unfolded.encode(x)), ours.decode(ours.encode(x)), **NEAR)
    ratio = unfolded.threshold / ours.threshold
    torch.testing.assert_close(unfolded.encode(x), ours.encode(x) * ratio, **NEAR)


def test_decoder_norms_of_one_that_saelens_folded(tmp_path):
    sae = trained()
    sae.normalize_decoder()
    formats.export(sae, tmp_path, to="saelens")
    SAE.load_from_disk(tmp_path, fold_W_dec_norm=True).save_model(tmp_path)
    loaded = formats.load(tmp_path).eval()
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    assert_same_codes(loaded.encode(x), sae.eval().encode(x))


def test_the_l0_that_saelens_measured_is_k(tmp_path):
    theirs = saelens_sae("jumprelu")
    theirs.cfg.metadata.l0 = 6.25
    theirs.save_inference_model(tmp_path)
    assert formats.load(tmp_path).cfg.k == 6.25


def test_saelens_covariance_whitening_is_refused(tmp_path):
    theirs = saelens_sae("topk", normalize_activations="layer_norm")
    theirs.save_inference_model(tmp_path)
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        formats.load(tmp_path)


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


def test_an_older_topk_without_threshold(tmp_path):
    made = dictionary_trainer(TopKTrainer)
    state = {name: t for name, t in made.ae.state_dict().items() if name not in ("threshold", "k")}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": made.config}))
    assert formats.load(tmp_path).cfg.k == 4


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


@pytest.mark.parametrize(
    "change", [{"transcode": True}, {"skip_connection": True}, {"activation": "groupmax"}], ids=str
)
def test_sparsify_kinds_that_are_refused(tmp_path, change):
    SparseCoder(12, SparseCoderConfig(k=4, num_latents=96, **change)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=rf"cfg\.json: {next(iter(change))}="):
        formats.load(tmp_path)
