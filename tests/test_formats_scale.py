"""The factor on the activations in the peers' files, and files with NaN in them."""

import json
import re

import pytest
import torch
from format_makers import DTYPES, FILES, RULES, cfg, changed_tensors, rule_for, trained, without_extra
from makers import tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sampled_sae import SampledSAE, formats
from sampled_sae.cli import main
from sampled_sae.integrations.saebench import SAEBenchSAE


def checkpoint(folder, factor, **rule):
    """As SAELens' trainer writes one from mid-training; returns the SAE whose weights it holds."""
    sae = trained(**rule)
    formats.export(sae, folder, to="saelens")
    cfg(normalize_activations="expected_average_only_in")(without_extra(folder))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    return sae.eval()


@pytest.mark.one_in(7)
@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["l=4, entropy", "topk"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_exported_reads_raw_activations(tmp_path, to, dtype, rule, alone):
    """The peer's files alone are an SAE of scale 1; with ours beside them the exported one comes back."""
    sae = trained(dtype, input_scale=0.25, **RULES[rule]).eval()
    formats.export(sae, tmp_path, to=to, **rule_for(to))
    if alone:
        without_extra(tmp_path)
    loaded = formats.read(tmp_path)
    assert loaded.scale == loaded.sae.cfg.input_scale == (1 if alone else 0.25)
    if to == "sparsify" and rule != "topk":
        return
    x = 4 * tokens(40, 12, dtype=dtype, seed=4)
    assert torch.equal(loaded.sae.encode(x) > 0, sae.encode(x) > 0)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype in (torch.float32, torch.float64) else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(loaded.sae(x).x_hat, sae(x).x_hat, **near)


@pytest.mark.parametrize("given", [None, 0.5, 2])
def test_a_given_scale_takes_the_place_of_the_saes_own(tmp_path, given):
    sae, x = trained(torch.float64, input_scale=0.25).eval(), tokens(40, 12, seed=4)
    factor = 0.25 if given is None else given
    formats.export(sae, tmp_path, to="saelens", scale=given)
    assert formats.load(tmp_path).cfg.input_scale == factor
    custom = SAEBenchSAE(sae, model_name="m", hook_layer=1, scale=given)
    expected = sae.decode(sae.encode(x * factor, scaled=True), scaled=True) / factor
    torch.testing.assert_close(custom(x), expected)
    for loaded in (formats.load(tmp_path), formats.load(without_extra(tmp_path))):
        torch.testing.assert_close(loaded(x).x_hat, expected)


@pytest.mark.parametrize("factor", [0.5, 3, None])
@pytest.mark.parametrize("rule", ["batchtopk", "topk"])
def test_a_training_checkpoint_of_saelens_has_its_factor_in_a_file(tmp_path, factor, rule):
    sae, x, said = checkpoint(tmp_path, factor, **RULES[rule]), tokens(40, 12, dtype=torch.float32, seed=4), []
    loaded = formats.read(tmp_path, k=4, say=said.append)
    scale = 1 if factor is None else factor
    assert loaded.scale == loaded.sae.cfg.input_scale == scale
    assert torch.equal(loaded.sae.encode(x / scale), sae.encode(x / scale * scale))
    assert torch.equal(loaded.sae.b_dec, sae.b_dec)
    assert any("activations are multiplied by" in line for line in said)
    moved = formats.load(tmp_path, k=4, scale=2 * scale)
    assert torch.equal(moved.b_dec, 2 * sae.b_dec)
    torch.testing.assert_close(moved(x / scale).x_hat, loaded.sae(x / scale).x_hat)
    assert main(["import", str(tmp_path), str(tmp_path / "ours"), "--k", "4"]) == 0
    assert SampledSAE.from_pretrained(tmp_path / "ours").cfg.input_scale == scale


@pytest.mark.parametrize("factor", ["2", 0, -1.0, [1], True])
def test_a_factor_that_is_no_number_is_named(tmp_path, factor):
    checkpoint(tmp_path, factor)
    with pytest.raises(ValueError, match=r"activation_scaler\.json: scaling_factor=.*: must be"):
        formats.load(tmp_path, k=4)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("names", [("W_enc", "encoder.weight", "encoder.weight"), ("b_dec",) * 3], ids=str)
@pytest.mark.parametrize("to", formats.FORMATS)
def test_nan_in_a_peers_file_is_named(tmp_path, to, names, value):
    formats.export(trained(), tmp_path, to=to, **rule_for(to))
    name = names[formats.FORMATS.index(to)]
    changed_tensors(tmp_path, to, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.raises(ValueError, match=rf"{FILES[to][0]}: {re.escape(name)} holds NaN or inf"):
        formats.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["threshold", "b_enc"])
def test_nan_in_what_stands_beside_a_peers_file_is_named(tmp_path, name, value):
    formats.export(trained(apply_b_dec_to_input=False), tmp_path, to="sparsify", inference="topk")
    file = tmp_path / "sampled_sae.safetensors"
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    save_file({**tensors, name: torch.full_like(tensors[name], value)}, file, about)
    with pytest.raises(ValueError, match=rf"sampled_sae\.safetensors: {name} holds NaN or inf"):
        formats.load(tmp_path)
