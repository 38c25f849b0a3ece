"""`cfg.inference`: what each of the three selects, how it is calibrated, saved, evaluated and exported."""

import json
from dataclasses import replace

import pytest
import torch
from makers import make_sae, tokens, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import InferenceSAE, SampledSAE, SampledSAEConfig, formats, load_inference, reference
from sampled_sae.cli import main
from sampled_sae.impl.inference_rule import NO_SET
from sampled_sae.impl.threshold import OF_ANOTHER_SET
from sampled_sae.integrations.saebench import SAEBenchSAE
from sampled_sae.training.evaluation import evaluate_activations

# Triton's interpreter takes seconds for what the others do at once
IMPLS = ["torch", "reference"]
X = tokens(64, 12, dtype=torch.float32)
OTHERS = tokens(16, 12, dtype=torch.float32, seed=2)
TOPK = {"l": None, "select": "token"}


def sae_with(inference, impl="torch", **rule):
    return make_sae(torch.float32, inference=inference, impl=impl, **rule).eval()


def activations(sae, x):
    return reference.encode(x - sae.b_dec, sae.W_enc, sae.b_enc).detach()


def in_set(sae, x, size):
    """Activations with zeros outside the features of highest score."""
    a = activations(sae, x)
    members = reference.candidate_pool(reference.column_scores(a, sae.cfg.score), size)
    return torch.zeros_like(a).index_copy_(1, members, a[:, members]), members


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "rule", [{"l": 3.0}, {"l": 2.0, "score": "entropy"}, {"l": None}, {"select": "token"}], ids=str
)
def test_batch_is_the_rule_of_training(impl, rule):
    sae = sae_with("batch", impl, **rule)
    codes = sae.encode(X)
    assert torch.equal(codes, sae.train().encode(X))
    assert torch.equal(sae.eval()(X).codes.to_dense(), codes)
    expected = reference.sampled_topk(X - sae.b_dec, sae.W_enc, sae.b_enc, **{"k": 4, "l": 3.0, **rule})
    torch.testing.assert_close(codes, expected)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    sae(X)
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["batch", "pool"])
def test_triton_selects_what_torch_does(inference):
    found = {}
    for impl in ("torch", "triton"):
        sae = sae_with(inference, impl, d_sae=32)
        sae.calibrate(OTHERS)
        found[impl] = sae.encode(tokens(8, 12, dtype=torch.float32))
    assert (found["torch"] > 0).sum() > 8
    torch.testing.assert_close(found["triton"], found["torch"])


def test_batch_draws_another_pool_for_each_batch_from_the_seed():
    rule = {"l": 1.0, "pool": "sample"}
    one, two = (sae_with("batch", **rule) for _ in range(2))
    drawn = [one.encode_sparse(X).features.unique() for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(two.encode_sparse(X).features.unique(), members) for members in drawn)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["l2", "entropy"])
@pytest.mark.parametrize(("size", "l0"), [(None, 4), (40, 4), (40, 1.5), (96, 4), (1, 4)])
def test_pool_is_a_threshold_inside_the_features_of_highest_score(impl, score, size, l0):
    sae = sae_with("pool", impl, score=score, inference_pool=size)
    size = size or 12
    inside, members = in_set(sae, X, size)
    threshold = sae.calibrate(X, l0)
    assert torch.equal(sae.inference_members.nonzero().squeeze(1), members)
    wanted = min(round(64 * l0), int((inside > 0).sum()))
    assert (sae.encode(X) > 0).sum() == wanted
    assert torch.equal(sae.encode(X) > 0, inside > threshold)
    torch.testing.assert_close(sae.encode(X), torch.where(inside > threshold, inside, 0))
    assert torch.equal(sae.encode_above_threshold(X).to_dense(), sae.encode(X))
    alone = torch.cat([sae.encode(x[None]) for x in OTHERS])
    assert torch.equal(alone > 0, sae.encode(OTHERS) > 0)


def test_a_set_that_was_never_chosen_is_refused():
    sae = sae_with("pool")
    for call in (sae, sae.encode, sae.encode_above_threshold, lambda x: evaluate_activations(sae, x)):
        with pytest.raises(ValueError, match=NO_SET[:30]):
            call(X)
    sae.train()(X)
    with pytest.raises(ValueError, match=NO_SET[:30]):
        sae.eval()(X)


def test_a_threshold_for_other_features_is_not_taken_for_calibrated():
    sae = sae_with("pool")
    sae.calibrate(X)
    sae.cfg = replace(sae.cfg, inference="threshold")
    assert "inference_members" not in sae.state_dict()
    with pytest.warns(UserWarning, match=OF_ANOTHER_SET[:40]):
        sae.encode(X)
    sae.calibrate(X)
    sae.cfg = replace(sae.cfg, inference="batch")
    sae.cfg = replace(sae.cfg, inference="threshold")
    assert sae.encode_sparse(X).count() == 64 * 4
    sae.cfg = replace(sae.cfg, inference="pool")
    with pytest.raises(ValueError, match=NO_SET[:30]):
        sae.encode(X)
    sae.calibrate(X)
    for change in ({"inference_pool": 13}, {"inference_pool": None, "l": 5.0}):
        sae.cfg = replace(sae.cfg, **change)
        assert not sae.inference_members.any()
        sae.calibrate(X)
    sae.cfg = replace(sae.cfg, dead_after=7)
    assert sae.inference_members.sum() == 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inference": "top"}, r"inference='top': must be one of 'threshold', 'batch', 'pool'"),
        ({"inference": None}, r"inference=None: must be one of"),
        ({"inference_pool": 0}, r"inference_pool=0: must be a whole number >= 1"),
        ({"inference_pool": 97}, r"inference_pool=97: must be None or in \[1, 96\]"),
        ({"inference": "pool", **TOPK}, r"inference='pool': a TopK SAE .* must be 'threshold' or 'batch'"),
    ],
)
def test_bad_values_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        SampledSAEConfig(d_in=12, d_sae=96, k=4, **changes)


@pytest.mark.parametrize("inference", ["threshold", "batch", "pool"])
def test_saved_and_loaded_bit_for_bit(tmp_path, inference):
    sae = sae_with(inference, inference_pool=20)
    sae.calibrate(X)
    sae.save_pretrained(tmp_path)
    loaded = SampledSAE.from_pretrained(tmp_path)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded.encode(X), sae.encode(X))
    assert loaded.state_dict().keys() == sae.state_dict().keys()


def test_files_from_before_there_was_a_choice_load(tmp_path):
    sae = sae_with("threshold")
    sae.calibrate(X)
    sae.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert not {"inference", "inference_pool"} & about["sae"].keys()
    assert torch.equal(SampledSAE.from_pretrained(tmp_path).encode(X), sae.encode(X))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("inference_members"), "tensor 'inference_members' is missing"),
        (lambda t: t.update(inference_members=torch.ones(96)), r"inference_members is torch\.float32"),
        (lambda t: t["inference_members"].fill_(True), "with 96 features, must be torch.bool with 0 or 20"),
        (lambda t: t.update(inference_members=torch.ones(3).bool()), r"inference_members is \(3,\)"),
    ],
)
def test_a_damaged_set_is_named(tmp_path, damage, words):
    sae = sae_with("pool", inference_pool=20)
    sae.calibrate(X)
    sae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=words):
        SampledSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("rule", [{"l": 3.0}, {"l": None}, TOPK, {"l": 2.0, "pool": "sample"}], ids=str)
@pytest.mark.parametrize("inference", ["threshold", "batch", "pool"])
def test_evaluation_reports_all_three(inference, rule):
    if rule == TOPK and inference == "pool":
        return
    sae = sae_with(inference, **rule)
    sae.calibrate(X)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    found = evaluate_activations(sae, X, batch_size=32)
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())
    assert found["inference"] == ("token" if rule == TOPK else inference)
    if rule == TOPK:
        assert found["threshold_fvu"] is found["pool_fvu"] is found["pool_features"] is None
        assert found["batch_fvu"] == found["fvu"]
        return
    for mode in ("threshold", "batch", "pool"):
        other = sae_with(mode, **rule)
        other.calibrate(X)
        alone = evaluate_activations(other, X, batch_size=32)
        for name in ("l0", "fvu", "features_for_90", "jaccard"):
            assert found[f"{mode}_{name}"] == pytest.approx(alone[name])
        assert found[f"{mode}_l0"] == pytest.approx(4, abs=0.1)
    assert found["pool_features"] == sae.cfg.pool_size
    assert found["fvu"] == found[f"{inference}_fvu"]


@pytest.mark.parametrize("rule", [{"l": None}, {"l": 2.0, "inference_pool": 96}, {"l": 3.0}], ids=str)
@pytest.mark.parametrize("inference", ["threshold", "pool"])
def test_evaluation_reports_the_inference_of_the_sae_as_it_is(inference, rule):
    sae = sae_with(inference, **rule)
    sae.calibrate(OTHERS, l0=2)
    found = evaluate_activations(sae, X, batch_size=32)
    assert all(found[name] == found[f"{inference}_{name}"] for name in ("l0", "fvu", "features_for_90", "jaccard"))
    whole = sae.cfg.inference_size == 96
    assert (found["threshold_fvu"] == found["pool_fvu"]) == whole


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("centred", [True, False])
def test_a_fixed_set_is_exported_exactly_and_comes_back_whole(tmp_path, to, centred):
    sae = sae_with("pool", inference_pool=20, apply_b_dec_to_input=centred)
    with torch.no_grad():
        sae.b_enc += 0.1
    sae.calibrate(X)
    said = []
    rule = "topk" if to == "sparsify" else "threshold"
    formats.export(sae, tmp_path, to=to, inference=rule, say=said.append)
    assert any(line.startswith("76 features outside the fixed set") for line in said)
    back = formats.load(tmp_path)
    assert back.cfg == sae.cfg
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in sae.state_dict().items())
    (tmp_path / "sampled_sae.safetensors").unlink()
    alone = formats.load(tmp_path, k=4)
    assert alone.cfg.inference == "threshold"
    if rule == "threshold":
        torch.testing.assert_close(alone.encode(OTHERS), sae.encode(OTHERS))


@pytest.mark.parametrize("to", formats.FORMATS)
def test_the_rule_of_a_batch_is_exported_as_another_one_only_when_asked(tmp_path, to):
    sae = sae_with("batch")
    sae.calibrate(X)
    with pytest.raises(ValueError, match=r"cfg\.inference='batch' depends on the whole batch"):
        formats.export(sae, tmp_path / "no", to=to)
    assert not (tmp_path / "no").exists()
    formats.export(sae, tmp_path / "yes", to=to, inference="topk")
    assert formats.load(tmp_path / "yes").cfg == sae.cfg
    with pytest.raises(ValueError, match="depends on the whole batch"):
        SAEBenchSAE(sae, model_name="m", hook_layer=1)


def test_read_for_inference_alone(tmp_path):
    for inference in ("pool", "batch"):
        sae = sae_with(inference, inference_pool=20)
        sae.calibrate(X)
        sae.save_pretrained(tmp_path / inference)
    read = load_inference(tmp_path / "pool")
    assert isinstance(read, InferenceSAE)
    pool = SampledSAE.from_pretrained(tmp_path / "pool")
    torch.testing.assert_close(read.encode_sparse(X).to_dense(), pool.encode(X))
    with pytest.raises(ValueError, match="inference='batch' depends on the whole batch"):
        load_inference(tmp_path / "batch")


def test_saebench_sees_the_fixed_set():
    sae = sae_with("pool", inference_pool=20)
    sae.calibrate(X)
    bench = SAEBenchSAE(sae, model_name="m", hook_layer=1)
    torch.testing.assert_close(bench.decode(bench.encode(OTHERS)), sae(OTHERS).x_hat)
    assert torch.equal(bench.encode(OTHERS) > 0, sae.encode(OTHERS) > 0)


def test_the_commands_train_evaluate_and_resume_it(tmp_path, capsys):
    store = write_store(tmp_path / "acts")
    train = ["train", str(store), str(tmp_path / "run"), "--features", "64", "--k", "4", "--steps", "6"]
    train += ["--batch-size", "50", "--inference", "pool", "--inference-pool", "24", "--quiet"]
    assert main(train) == 0
    sae = SampledSAE.from_pretrained(tmp_path / "run")
    assert (sae.cfg.inference, int(sae.inference_members.sum())) == ("pool", 24)
    assert main(["evaluate", str(tmp_path / "run"), str(store), "--splice-rows", "0", "--quiet"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["inference"] == "pool"
    assert found["fvu"] == found["pool_fvu"] != found["threshold_fvu"]
    assert main(train) == 0
    assert main([*train, "--inference", "batch"]) == 1
    assert "inference was 'pool', is 'batch'" in capsys.readouterr().err
    assert main([*train, "--inference", "threshold"]) == 1
    assert "inference was 'pool', is 'threshold'" in capsys.readouterr().err
