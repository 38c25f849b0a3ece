"""SAEBenchSAE against our own evaluation mode, SAEBench's custom SAEs and its evaluations, run offline."""

import json
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.meta_structure import main as meta_structure
from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
from sae_bench.sae_bench_utils import activation_collection, general_utils
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae.integrations.saebench import SAEBenchSAE

RULES = [{"l": 4.0}, {"l": None}, {"l": None, "select": "token"}, {"l": None, "apply_b_dec_to_input": False}]


def trained(d_in=24, d_sae=160, k=6, dtype=torch.float32, unit=True, **rule):
    """A SampledSAE as training leaves it: biases, decoder rows of any norm unless `unit`, a threshold."""
    torch.manual_seed(0)
    sae = SampledSAE(SampledSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **rule), dtype=dtype)
    with torch.no_grad():
        sae.W_enc.mul_(1.3)
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.5)
        if not unit:
            sae.W_dec.mul_(torch.rand(d_sae, 1) * 2 + 0.1)
    sae.calibrate(torch.randn(2000, d_in).to(dtype))
    return sae.eval()


def wrapped(sae, **options):
    return SAEBenchSAE(sae, **{"model_name": "tiny", "hook_layer": 1, **options})


@pytest.mark.parametrize("scale", [1.0, 0.3, 17.0])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_codes_and_reconstructions_are_ours(rule, unit, scale):
    sae = trained(unit=unit, **rule)
    custom = wrapped(sae, scale=scale, inference="threshold")
    x = torch.randn(3, 50, 24) / scale
    codes = sae.encode_above_threshold(x * scale).to_dense().view(3, 50, 160)
    x_hat = sae.decode(codes) / scale
    found = custom.encode(x)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    torch.testing.assert_close(found, codes * norms / scale, rtol=1e-4, atol=1e-5 / scale)
    assert torch.equal(found > 0, codes > 0)
    torch.testing.assert_close(custom(x), x_hat, rtol=1e-4, atol=1e-5 / scale)
    torch.testing.assert_close(custom.decode(found), x_hat, rtol=1e-4, atol=1e-5 / scale)
    torch.testing.assert_close(custom.encode(x.view(-1, 24)), found.view(-1, 160))
    assert general_utils.check_decoder_norms(custom.W_dec.data)
    assert BaseSAE.check_decoder_norms(custom)


@pytest.mark.parametrize("unit", [True, False])
def test_topk_keeps_what_training_kept(unit):
    sae = trained(l=None, select="token", unit=unit)
    custom = wrapped(sae, scale=0.5)
    x = torch.randn(60, 24)
    out = sae.train()(x * 0.5)
    torch.testing.assert_close(custom(x), out.x_hat / 0.5, rtol=1e-4, atol=1e-5)
    assert torch.equal(custom.encode(x) > 0, out.codes.to_dense() > 0)
    assert custom.cfg.architecture == "topk"


@pytest.mark.parametrize("inference", ["topk", "threshold"])
def test_encode_is_that_of_saebenchs_own_sae(inference):
    custom = wrapped(trained(l=None, select="token"), inference=inference)
    theirs = TopKSAE(24, 160, 6, "tiny", 1, "cpu", torch.float32, use_threshold=inference == "threshold")
    weights = {name: getattr(custom, name).data for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if inference == "threshold":
        weights["threshold"] = custom.threshold[0].clone()
    theirs.load_state_dict(weights, strict=False)
    x = torch.randn(4, 30, 24)
    torch.testing.assert_close(custom.encode(x), theirs.encode(x))
    torch.testing.assert_close(custom(x), theirs(x))
    assert set(asdict(theirs.cfg)) <= set(custom.cfg.to_dict())
    assert all(hasattr(custom.cfg, name) for name in dir(theirs.cfg) if not name.startswith("_"))


def test_dtype_moves_weights_and_leaves_the_threshold_exact():
    sae = trained(l=None)
    custom = wrapped(sae)
    exact = custom.threshold.clone()
    assert custom.to(device="cpu", dtype=torch.bfloat16) is custom
    assert custom.dtype == custom.W_enc.dtype == custom.b_dec.dtype == torch.bfloat16
    assert custom.device == torch.device("cpu")
    assert custom.cfg.dtype == "bfloat16"
    assert torch.equal(custom.threshold, exact)
    assert general_utils.check_decoder_norms(custom.W_dec.data)
    x = torch.randn(400, 24).bfloat16()
    found, expected = custom.encode(x), sae.encode(x.float())
    assert found.dtype == custom(x).dtype == torch.bfloat16
    far = ((x.float() - sae.b_dec) @ sae.W_enc + sae.b_enc - sae.threshold).abs() > 0.05
    torch.testing.assert_close(found.float()[far], expected[far], rtol=2**-6, atol=0)
    assert far.float().mean() > 0.9
    assert sae.W_dec.dtype == torch.float32


def test_a_float64_sae_stays_in_float64():
    sae = trained(dtype=torch.float64, l=None, unit=False)
    custom = wrapped(sae)
    x = torch.randn(40, 24, dtype=torch.float64)
    assert custom.threshold.dtype == custom.encode(x).dtype == torch.float64
    torch.testing.assert_close(custom(x), sae(x).x_hat, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(n_layers=2, d_model=24, n_ctx=32, d_head=12, n_heads=2, d_vocab=50, act_fn="relu")
    return HookedTransformer(cfg).eval()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(50, (64, 16))


def standardized(custom):
    sae_id, found, _ = general_utils.load_and_format_sae("release", custom, "cpu")
    assert sae_id == "custom_sae"
    assert found is custom
    return custom


@pytest.mark.parametrize("rule", RULES[1:3], ids=str)
def test_saebenchs_core_evaluation_runs_and_agrees(rule, model, tokens, tmp_path):
    """Every metric it has; those that we can compute ourselves are the same."""
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post")
    acts = cache["blocks.1.hook_resid_post"]
    scale = float(24**0.5 / acts.norm(dim=-1).square().mean().sqrt())
    sae = SampledSAE(SampledSAEConfig(d_in=24, d_sae=96, k=6, **rule))
    sae.init_b_dec(acts.flatten(0, 1)[:100] * scale)
    sae.calibrate(acts * scale)
    custom = standardized(wrapped(sae.eval(), scale=scale, context_size=16))
    store = ActivationsStore.from_sae(
        model, custom, dataset=Dataset.from_dict({"tokens": tokens.tolist()}), streaming=False, device="cpu"
    )
    everything = {name: True for name in vars(CoreEvalConfig()) if name.startswith("compute_")}
    config = CoreEvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=8, **everything
    )
    metrics, features = core.run_evals(custom, store, model, config)
    codes, x_hat = custom.encode(acts).flatten(0, 1), custom(acts).flatten(0, 1)
    assert metrics["sparsity"]["l0"] == pytest.approx(float((codes > 0).sum(1).float().mean()), rel=1e-4)
    assert metrics["sparsity"]["l0"] == pytest.approx(6, abs=0.1)
    mse = (acts.flatten(0, 1) - x_hat).square().sum(1).mean()
    cosine = torch.cosine_similarity(acts.flatten(0, 1), x_hat).mean()
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(float(cosine), rel=1e-3)
    assert metrics["reconstruction_quality"]["mse"] * 8 * 16 == pytest.approx(float(mse), rel=1e-3)
    assert features["feature_density"] == pytest.approx((codes > 0).float().mean(0).tolist(), abs=1e-6)
    assert features["encoder_bias"] == custom.b_enc.tolist()
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    metrics["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {
        "eval_cfg": config,
        "metrics": metrics,
        "feature_metrics": features,
        "sae_id": "custom",
        "sae_set": "ours",
    }
    core.save_single_eval_result(result, "id", "version", "commit", str(tmp_path / "result.json"), custom)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["sae_cfg_dict"]["d_sae"] == 96
    assert written["sae_cfg_dict"]["training"]["k"] == 6


def test_saebenchs_meta_structure_evaluation_runs():
    config = MetaStructureEvalConfig(train_steps=20, train_batch_size=64, autocast=False)
    result = meta_structure.run_eval_single_sae("ours", "custom", standardized(wrapped(trained(l=4))), config, "cpu")
    explained = result.eval_result_metrics.meta_structure.decoder_fraction_variance_explained
    assert explained < 1
    assert result.sae_cfg_dict["architecture"] == "sampled_sae"


def test_saebenchs_mean_activations_are_ours():
    custom = wrapped(trained(l=None))
    acts = torch.randn(10, 7, 24)
    found = activation_collection.get_sae_meaned_activations({"class": acts}, custom, 4)["class"]
    torch.testing.assert_close(found, custom.encode(acts).mean(1))


@pytest.mark.parametrize("unset", [0.0, -1.0])
def test_a_threshold_that_was_never_set(unset):
    """-1 is what dictionary_learning's dictionaries hold until then."""
    sae = SampledSAE(SampledSAEConfig(d_in=24, d_sae=160, k=6))
    sae.threshold.fill_(unset)
    with pytest.raises(ValueError, match=r"sae\.threshold was never set"):
        wrapped(sae)


def test_no_code_is_negative():
    sae = trained()
    sae.threshold.fill_(-1.0)
    x = torch.randn(50, 24)
    codes = wrapped(sae).encode(x)
    assert torch.equal(codes > 0, sae.encode(x) > 0)
    assert float(codes.min()) == 0


def test_the_sae_is_copied():
    sae = trained(unit=False)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    custom = wrapped(sae)
    with torch.no_grad():
        for p in custom.parameters():
            assert not p.requires_grad
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_bad_input_is_named():
    sae = trained()
    untrained = SampledSAE(SampledSAEConfig(d_in=24, d_sae=160, k=6))
    silent = trained()
    with torch.no_grad():
        silent.W_dec[3] = 0
    for options, error, message in (
        ({"sae": torch.nn.Linear(2, 2)}, TypeError, "sae=Linear"),
        ({"sae": untrained}, ValueError, "sae.threshold was never set"),
        ({"sae": silent}, ValueError, "sae.W_dec: 1 rows are zero"),
        ({"model_name": ""}, TypeError, "model_name=''"),
        ({"hook_layer": -1}, ValueError, "hook_layer=-1"),
        ({"scale": 0.0}, ValueError, "scale=0.0"),
        ({"inference": "relu"}, ValueError, "inference='relu'"),
    ):
        with pytest.raises(error, match=message):
            wrapped(**{"sae": sae, **options})
    with pytest.raises(ValueError, match="d_in=24"):
        wrapped(sae).encode(torch.randn(4, 23))
