"""SAELens' files from before its release 6; tests/peers hold them against its own reader."""

import json

import pytest
import torch
from format_makers import changed_tensors, put, tensors_of, trained, without_extra

from sampled_sae import formats

OLD = {"d_in": 12, "d_sae": 96, "dtype": "float32", "hook_point": "blocks.2.hook_z", "hook_layer": 2}


def test_a_topk_of_saelens_from_before_release_6(tmp_path):
    """Nothing names the architecture; of the factors that some versions wrote, those of 1 say nothing."""
    sae, said = trained(l=None, select="token"), []
    formats.export(sae, tmp_path, to="saelens")
    old = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
    (without_extra(tmp_path) / "cfg.json").write_text(json.dumps(old))
    put("saelens", scaling_factor=torch.ones(96))(tmp_path)
    loaded = formats.read(tmp_path, say=said.append)
    assert (loaded.sae.cfg.k, loaded.sae.cfg.select, loaded.sae.cfg.l) == (4, "token", None)
    assert torch.equal(loaded.sae.W_enc, sae.W_enc)
    assert loaded.origin == formats.Origin(layer=2, hook_name="blocks.2.hook_z")
    assert any("reshape_activations='hook_z'" in line for line in said)
    (tmp_path / "cfg.json").write_text(json.dumps({**old, "activation_fn_kwargs": {}}))
    with pytest.raises(ValueError, match="k=None: must be of type int"):
        formats.load(tmp_path)
    put("saelens", scaling_factor=torch.full((96,), 1.1))(tmp_path)
    with pytest.raises(ValueError, match=r"unknown \['scaling_factor'\]"):
        formats.load(tmp_path)


def test_a_jumprelu_of_saelens_with_the_logarithm_of_its_threshold(tmp_path):
    formats.export(trained(torch.float64), tmp_path, to="saelens")
    threshold = tensors_of(without_extra(tmp_path), "saelens")["threshold"]
    changed_tensors(tmp_path, "saelens", lambda t: t.update(log_threshold=t.pop("threshold").log()))
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD, "architecture": "jumprelu", "normalize_activations": True}))
    said = []
    loaded = formats.load(tmp_path, k=4, say=said.append)
    torch.testing.assert_close(loaded.threshold, threshold[0])
    assert any("this is a training checkpoint" in line for line in said)
