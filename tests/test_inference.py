"""Evaluation mode: a TopK SAE keeps its rule, all others use a threshold, and one that was never calibrated says so."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from format_makers import RULES as ALL_RULES
from format_makers import rule_for, trained, without_extra
from makers import make_sae, tokens, write_store
from safetensors.torch import load_file, save_file

from sampled_sae import ActivationStore, RowAdam, SampledSAE, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae.cli import main
from sampled_sae.impl.threshold import NEVER_SET, RUNNING_MEAN
from sampled_sae.integrations.saebench import SAEBenchSAE
from sampled_sae.training.evaluation import evaluate_activations

TOPK = {"l": None, "select": "token"}
BY_THRESHOLD = {name: rule for name, rule in ALL_RULES.items() if rule != TOPK}


def warned(call, *args):
    """(what `call` returns, the texts of its warnings)."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*args)
    return result, [str(w.message) for w in found]


def stepped(steps=1, **rule):
    """An SAE after training steps without a calibration."""
    sae = make_sae(**rule)
    for seed in range(steps):
        sae(tokens(64, 12, seed=seed))
    return sae


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("k", "dtype"), [(4, torch.float64), (1, torch.float32), (9, torch.bfloat16)])
@pytest.mark.parametrize("threshold", [0.0, 1.3, 1e6])
def test_a_topk_sae_keeps_k_of_each_token_whatever_the_threshold(impl, k, dtype, threshold):
    sae = make_sae(dtype, k=k, impl=impl, **TOPK)
    sae.threshold.fill_(threshold)
    x = tokens(30, 12, dtype=dtype)
    by_batch = sae.encode(x)
    sae.eval()
    codes, said = warned(sae.encode, x)
    assert said == []
    assert torch.equal(codes > 0, by_batch > 0)
    assert ((codes > 0).sum(1) == k).all()
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(codes, alone)
    torch.testing.assert_close(sae(x).x_hat, sae.decode(sae.encode_sparse(x)))
    sae.cfg = replace(sae.cfg, k=2)
    assert ((sae.encode(x) > 0).sum(1) == 2).all()
    above = sae.encode_above_threshold(x)
    assert (above.count() > 0) == (threshold < 1e6)
    assert float(above.smallest()) > threshold


@pytest.mark.parametrize("rule", [{"l": None}, {"l": 2.0, "select": "token"}, {"l": 1.0}], ids=str)
def test_all_others_use_the_threshold(rule):
    sae = make_sae(**rule).eval()
    sae.calibrate(tokens(64, 12), 6)
    assert sae.encode_sparse(tokens(64, 12)).count() == 6 * 64
    assert torch.equal(sae.encode(tokens(9, 12)), sae.encode_above_threshold(tokens(9, 12)).to_dense())


@pytest.mark.parametrize("method", ["__call__", "encode", "encode_sparse"])
@pytest.mark.parametrize(("steps", "words"), [(0, NEVER_SET), (3, RUNNING_MEAN)])
@pytest.mark.parametrize("rule", BY_THRESHOLD.values(), ids=BY_THRESHOLD)
def test_a_threshold_that_was_never_calibrated_says_so_once(method, rule, steps, words):
    sae, x = stepped(steps, **rule), tokens(8, 12)
    call = getattr(sae, method)
    if steps:
        assert warned(call, x)[1] == []
    sae.eval()
    assert warned(call, x)[1] == [words]
    assert warned(call, x)[1] == []
    sae.train()(x)
    sae.eval()
    assert warned(call, x)[1] == []
    twin = copy.deepcopy(sae)
    twin.calibrate(x)
    assert warned(twin.encode, x)[1] == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sae: sae])
def test_training_on_makes_a_calibrated_threshold_a_running_mean_again(copied):
    sae, x = copied(stepped(2)), tokens(8, 12)
    sae.calibrate(x)
    assert warned(sae.eval().encode, x)[1] == []
    sae.train()(x)
    assert warned(sae.eval().encode, x)[1] == [RUNNING_MEAN]


@pytest.mark.parametrize("how", ["saved", "state", "older file", "older state", "by hand", "calibrated"])
def test_what_counts_as_calibrated(tmp_path, how):
    sae, x = stepped(0 if how == "by hand" else 3), tokens(8, 12)
    if how == "by hand":
        sae.threshold.fill_(0.7)
    else:
        sae.calibrate(x)
    loaded = sae
    if "file" in how or how == "saved":
        sae.save_pretrained(tmp_path)
        if how == "older file":
            tensors = load_file(tmp_path / "sae.safetensors")
            del tensors["calibrated_at"]
            save_file(tensors, tmp_path / "sae.safetensors")
        loaded = SampledSAE.from_pretrained(tmp_path)
    elif "state" in how:
        state = sae.state_dict()
        if how == "older state":
            del state["calibrated_at"]
        loaded = torch.nn.Sequential(make_sae())
        loaded.load_state_dict({f"0.{name}": value for name, value in state.items()})
        loaded = loaded[0]
    assert torch.equal(loaded.threshold, sae.threshold)
    assert warned(loaded.eval().encode, x)[1] == []


def test_an_uncalibrated_sae_is_uncalibrated_after_saving_too(tmp_path):
    stepped(3, l=1.0).save_pretrained(tmp_path)
    assert warned(SampledSAE.from_pretrained(tmp_path).encode, tokens(8, 12))[1] == [RUNNING_MEAN]


@pytest.mark.parametrize("rule", BY_THRESHOLD.values(), ids=BY_THRESHOLD)
def test_evaluation_refuses_a_threshold_that_was_never_set(rule):
    sae, x = make_sae(torch.float32, **rule), tokens(40, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^sae\.threshold was never set: .* call sae\.calibrate\(x\) first"):
        evaluate_activations(sae, x)
    with pytest.raises(ValueError, match=r"^sae\.threshold was never set"):
        SAEBenchSAE(sae, model_name="m", hook_layer=1)
    sae.calibrate(x)
    assert evaluate_activations(sae, x)["l0"] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("k", [4, 2])
def test_an_imported_topk_sae_is_evaluated_as_one(tmp_path, to, k, capsys):
    formats.export(trained(k=k, **TOPK), tmp_path / "theirs", to=to, **rule_for(to))
    assert main(["import", str(without_extra(tmp_path / "theirs")), str(tmp_path / "ours")]) == 0
    store = write_store(tmp_path / "store")
    assert main(["evaluate", str(tmp_path / "ours"), str(store), "--splice-rows", "0"]) == 0
    result = json.loads((tmp_path / "ours" / "evaluation.json").read_text())
    assert result["l0"] == result["batch_l0"] == k
    assert result["threshold"] is None
    assert "calibrated" not in capsys.readouterr().out


def test_the_command_calibrates_what_has_no_threshold_and_says_so(tmp_path, capsys):
    SampledSAE(SampledSAEConfig(d_in=12, d_sae=96, k=4, l=2.0)).save_pretrained(tmp_path / "sae")
    before = (tmp_path / "sae" / "sae.safetensors").read_bytes()
    store = write_store(tmp_path / "store")
    assert main(["evaluate", str(tmp_path / "sae"), str(store), "--splice-rows", "0"]) == 0
    assert "no threshold yet" in capsys.readouterr().out
    result = json.loads((tmp_path / "sae" / "evaluation.json").read_text())
    sae = SampledSAE.from_pretrained(tmp_path / "sae")
    assert result["threshold"] == sae.calibrate(ActivationStore.open(store).first(10_000)) > 0
    assert result["l0"] == pytest.approx(4, rel=0.5)
    assert (tmp_path / "sae" / "sae.safetensors").read_bytes() == before


def test_a_training_ends_calibrated_and_an_own_loop_does_not(tmp_path):
    store = ActivationStore.open(write_store(tmp_path / "store"))
    config = SampledSAEConfig(d_in=12, d_sae=96, k=4, l=1.0)
    sae = Trainer(config, TrainConfig(steps=10, batch_size=50), store, tmp_path / "run").run(progress=False)
    x = store.holdout()[0]
    assert warned(sae.encode, x)[1] == []
    own = SampledSAE(replace(config, input_scale=store.scale, row_grads=True))
    optimizer = RowAdam(own)
    for batch in store.first(500).split(50):
        optimizer.zero_grad()
        own(batch).loss.backward()
        optimizer.step()
    assert warned(own.eval().encode, x)[1] == [RUNNING_MEAN]
    assert own.encode_sparse(x).l0() > 2 * 4
    own.calibrate(x)
    assert own.encode_sparse(x).l0() == 4


@pytest.mark.one_in(4)
@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_what_is_loaded_is_in_evaluation_mode(tmp_path, to, rule):
    sae = trained(**ALL_RULES[rule])
    sae.save_pretrained(tmp_path / "ours")
    formats.export(sae, tmp_path / "theirs", to=to, **rule_for(to))
    x = tokens(30, 12, dtype=torch.float32)
    for loaded in (SampledSAE.from_pretrained(tmp_path / "ours"), formats.load(tmp_path / "theirs")):
        assert not loaded.training
        threshold = loaded.threshold.clone()
        first = loaded.encode(x)
        for row in x:
            loaded(row)
        assert torch.equal(loaded.threshold, threshold)
        assert torch.equal(loaded.encode(x), first)
        torch.testing.assert_close(torch.cat([loaded.encode(row[None]) for row in x]), first)
    assert SampledSAE.from_pretrained(tmp_path / "ours").train().training


def test_an_export_of_an_uncalibrated_sae_says_so(tmp_path):
    for name, sae, words in (("never", make_sae(), "never set"), ("mean", stepped(2), "running mean")):
        said = []
        formats.export(sae, tmp_path / name, to="saelens", say=said.append)
        assert any(words in line for line in said)
    said = []
    formats.export(trained(), tmp_path / "calibrated", to="saelens", say=said.append)
    assert said == []


@pytest.mark.parametrize(("rule", "words"), [({"l": 1.0}, [RUNNING_MEAN]), ({"l": None}, [RUNNING_MEAN]), (TOPK, [])])
def test_saebench_is_told_of_a_running_mean_too(rule, words):
    def wrap(sae):
        return SAEBenchSAE(sae, model_name="m", hook_layer=1)

    sae = stepped(2, **rule)
    assert warned(wrap, sae)[1] == words
    sae.calibrate(tokens(64, 12))
    assert warned(wrap, sae)[1] == []
