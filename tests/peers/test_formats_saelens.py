"""What SAELens writes, through ours, and what it reads of our configuration."""

import json

import pytest
import torch
from format_peers_makers import NEAR, assert_same_codes, disturbed, trained, under
from makers import tokens
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file

from sampled_sae import formats
from sampled_sae.integrations import saelens

BATCH, WIDTHS = {"k": 4.5}, {"k": 4.5, "matryoshka_widths": [32, 96]}
POOL = {"k": 4.5, "l": 2.0, "score": "entropy", "aux_pool": 7, "topk_threshold_lr": 0.25, "aux_loss_coefficient": 0.5}
MADE = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 4}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, BATCH),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, WIDTHS),
    "sampled": (saelens.SampledTrainingSAE, saelens.SampledTrainingSAEConfig, POOL),
    "sampled_topk": (saelens.SampledTopKTrainingSAE, saelens.SampledTopKTrainingSAEConfig, {"k": 4}),
    "sampled_batchtopk": (saelens.SampledBatchTopKTrainingSAE, saelens.SampledBatchTopKTrainingSAEConfig, BATCH),
    "sampled_matryoshka": (
        saelens.SampledMatryoshkaBatchTopKTrainingSAE,
        saelens.SampledMatryoshkaBatchTopKTrainingSAEConfig,
        WIDTHS,
    ),
}


def test_what_saelens_writes_again_is_still_whole(tmp_path):
    """Loaded and saved by the peer, in place with the extra file, elsewhere by what its metadata keep."""
    sae = trained(shape=(12, 96, 3.5), l=2.0, score="entropy", dead_after=30)
    origin = formats.Origin("org/model", 5, "blocks.5.hook_resid_pre", 128)
    formats.export(sae, tmp_path / "a", to="saelens", origin=origin)
    SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "a")
    SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    for name in ("a", "b"):
        loaded = formats.read(tmp_path / name)
        assert loaded.sae.cfg == sae.cfg
        assert loaded.origin == origin
        assert torch.equal(loaded.sae.threshold, sae.threshold)


@pytest.mark.parametrize("stage", ["inference", "training"])
def test_what_saelens_keeps_of_a_training_in_a_pool(tmp_path, stage):
    theirs = saelens_sae("sampled")
    theirs.save_inference_model(tmp_path) if stage == "inference" else theirs.save_model(tmp_path)
    cfg = formats.load(tmp_path).cfg
    assert (cfg.k, cfg.l, cfg.score, cfg.select, cfg.aux_pool) == (4.5, 2.0, "entropy", "batch", 7)
    assert (cfg.threshold_decay, cfg.aux_coefficient) == (0.75, 0.5)


def test_what_saelens_reads_of_the_configuration(tmp_path):
    origin = formats.Origin("org/model", layer=5, context_size=64)
    formats.export(trained(), tmp_path, to="saelens", origin=origin)
    cfg = SAE.load_from_disk(tmp_path).cfg
    assert (cfg.architecture(), cfg.d_in, cfg.d_sae, cfg.dtype) == ("jumprelu", 12, 96, "float32")
    assert (cfg.apply_b_dec_to_input, cfg.normalize_activations) == (True, "none")
    assert (cfg.metadata.model_name, cfg.metadata.hook_name) == ("org/model", "blocks.5.hook_resid_post")
    assert (cfg.metadata.context_size, cfg.metadata.training_architecture) == (64, "sampled_sae")


def saelens_sae(name, dtype="float32", **options):
    common = {"d_in": 12, "d_sae": 96, "dtype": dtype, "decoder_init_norm": 1.0}
    if name == "jumprelu":
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, jumprelu_init_threshold=1.7))
        threshold = sae.threshold.data.clone()
        disturbed(sae).threshold.data = threshold
        return sae
    cls, config, settings = MADE[name]
    sae = disturbed(cls(config(**common, **settings, **options)))
    if "batchtopk" in sae.cfg.architecture() or name == "sampled":
        sae.topk_threshold.fill_(2.0 if dtype != "float32" else 2.0123456789)
    return sae


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@torch.no_grad()
def test_saelens_own_saves(tmp_path, name, rescale, dtype):
    theirs = saelens_sae(name, dtype, rescale_acts_by_decoder_norm=rescale)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    inference = SAE.load_from_disk(tmp_path / "inference")
    x = tokens(50, 12, dtype=getattr(torch, dtype), seed=5)
    expected = inference.encode(x)
    rule = "topk" if name in ("topk", "sampled_topk") else "threshold"
    for stage in ("inference", "training"):
        ours = under(formats.load(tmp_path / stage), rule)
        assert ours.cfg.k == (4 if rule == "topk" else 4.5)
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


@pytest.mark.parametrize("factor", [0.37, 8.0, None])
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_a_checkpoint_from_mid_training_has_its_factor(tmp_path, name, factor):
    """Its files are as SAETrainer.save_checkpoint writes them; raw activations go in, reconstructions come out raw."""
    theirs = saelens_sae(name, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    scaler = ActivationScaler(factor)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    ours, x = formats.load(tmp_path), tokens(50, 12, dtype=torch.float32, seed=5) / (factor or 1)
    assert ours.cfg.input_scale == (factor or 1)
    theirs.fold_W_dec_norm()
    theirs.save_inference_model(tmp_path / "inference")
    inference = SAE.load_from_disk(tmp_path / "inference")
    codes = inference.encode(scaler.scale(x))
    assert_same_codes(codes, ours.encode(x))
    torch.testing.assert_close(scaler.unscale(inference.decode(codes)), ours.decode(ours.encode(x)), **NEAR)
    formats.export(ours, tmp_path / "folded", to="saelens")
    folded = SAE.load_from_disk(tmp_path / "folded")
    assert_same_codes(folded.encode(x), ours.encode(x), factor or 1)
    torch.testing.assert_close(folded.decode(folded.encode(x)), ours.decode(ours.encode(x)), **NEAR)


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


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("covariance_whitening", "fold it in with SAELens first"),
        ("layer_norm", "has no place in a SampledSAE"),
        ("constant_norm_rescale", "has no place in a SampledSAE"),
    ],
)
def test_what_is_done_to_activations_at_run_time_is_refused(tmp_path, mode, words):
    saelens_sae("topk", normalize_activations=mode).save_inference_model(tmp_path)
    with pytest.raises(ValueError, match=rf"cfg\.json: normalize_activations='{mode}': must be 'none'; .*{words}"):
        formats.load(tmp_path)


OLD = {"d_in": 12, "d_sae": 96, "dtype": "float32", "hook_name": "blocks.2.hook_resid_post", "device": "cpu"}
OLD_KINDS = {
    "topk": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "topk without a name": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
    "jumprelu": {"architecture": "jumprelu", "sae_lens_version": "5.11.0"},
    "jumprelu, logarithm": {"architecture": "jumprelu"},
}


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("centred", [True, False, None])
@pytest.mark.parametrize("kind", OLD_KINDS)
@torch.no_grad()
def test_files_from_before_release_6(tmp_path, kind, centred, ones):
    """Read as SAELens reads them; it takes b_dec from the input where the file does not say."""
    rule = "topk" if kind.startswith("topk") else "threshold"
    formats.export(trained(l=None), tmp_path, to="saelens", inference=rule)
    old = {**OLD, **OLD_KINDS[kind], "normalize_activations": "none"}
    old |= {} if centred is None else {"apply_b_dec_to_input": centred}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file) | ({"scaling_factor": torch.ones(96)} if ones else {})
    if "logarithm" in kind:
        tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, file)
    loaded = formats.read(tmp_path, k=4)
    x = tokens(50, 12, dtype=torch.float32, seed=5)
    # the logarithm is what its training checkpoints held
    theirs = (JumpReLUTrainingSAE if "logarithm" in kind else SAE).load_from_disk(tmp_path)
    codes = theirs.encode(x)
    ours = under(loaded.sae, rule)
    assert_same_codes(codes, ours.encode(x))
    torch.testing.assert_close(theirs.decode(codes), ours.decode(ours.encode(x)), **NEAR)
    assert loaded.origin.hook_name == theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
