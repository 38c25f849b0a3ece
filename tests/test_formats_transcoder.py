"""Transcoders in the peers' files and back, and read for inference."""

import json

import pytest
import torch
from format_makers import OURS, config_of, same_files, same_tensors, tensors_of, without_extra
from makers import make_sae, tokens

from sampled_sae import formats
from sampled_sae.formats.published import load_inference, save_inference

SCALES = {"input_scale": 0.37, "output_scale": 0.6}
SHAPES = [{"d_out": 7}, {"d_out": 7, "skip": True}, {"skip": True}]
THRESHOLD, TOPK = {"l": 2.0, "score": "entropy"}, {"l": None, "select": "token"}


def trained(dtype=torch.float32, **settings):
    sae = make_sae(dtype, **settings)
    for seed in range(2):
        sae(tokens(9, 12, dtype=dtype, seed=seed), tokens(9, sae.cfg.width_out, dtype=dtype, seed=seed + 50))
    sae.calibrate(tokens(200, 12, dtype=dtype, seed=7))
    return sae.eval()


@pytest.mark.parametrize("scales", [{}, SCALES], ids=["as they are", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_saelens_there_and_back(tmp_path, shape, dtype, scales):
    sae = trained(dtype, **shape, **THRESHOLD, **scales)
    sae.save_pretrained(tmp_path / "ours")
    formats.export(sae, tmp_path / "theirs", to="saelens")
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)
    architecture = "jumprelu_skip_transcoder" if sae.cfg.skip else "jumprelu_transcoder"
    assert config_of(tmp_path / "theirs", "saelens")["architecture"] == architecture
    before = tensors_of(tmp_path / "theirs", "saelens")
    again = formats.load(without_extra(tmp_path / "theirs"), k=4)
    formats.export(again, tmp_path / "again", to="saelens")
    assert same_tensors(before, tensors_of(tmp_path / "again", "saelens"))


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_there_and_back(tmp_path, skip):
    sae = trained(d_out=12, skip=skip, **TOPK, **SCALES)
    sae.save_pretrained(tmp_path / "ours")
    formats.export(sae, tmp_path / "theirs", to="sparsify")
    formats.load(tmp_path / "theirs").save_pretrained(tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back", OURS)
    config = config_of(tmp_path / "theirs", "sparsify")
    assert (config["transcode"], config["skip_connection"]) == (True, skip)
    before = tensors_of(tmp_path / "theirs", "sparsify")
    again = formats.load(without_extra(tmp_path / "theirs"))
    assert (again.cfg.d_out, again.cfg.skip, again.cfg.apply_b_dec_to_input) == (12, skip, False)
    formats.export(again, tmp_path / "again", to="sparsify")
    assert same_tensors(before, tensors_of(tmp_path / "again", "sparsify"))


@pytest.mark.parametrize("to", ["saelens", "sparsify", "ours"])
def test_what_the_files_compute(tmp_path, to):
    """Read for inference, each gives what the transcoder itself does of activations as they are."""
    rule = TOPK if to == "sparsify" else THRESHOLD
    sae = trained(torch.float64, d_out=12, skip=True, **rule, **SCALES)
    x = tokens(30, 12, seed=9)
    sae.save_pretrained(tmp_path) if to == "ours" else formats.export(sae, tmp_path, to=to)
    found = load_inference(tmp_path, say=lambda line: None)
    expected = sae(x, tokens(30, 12))
    assert torch.equal(found.encode_sparse(x).features, expected.codes.features)
    torch.testing.assert_close(found(x).x_hat, expected.x_hat)
    if to != "ours":
        torch.testing.assert_close(sae.decode(sae.encode(x), x), formats.load(tmp_path)(x, x).x_hat)


def test_relu_transcoders_of_saelens_have_a_threshold_of_zero(tmp_path):
    sae = trained(torch.float64, d_out=7, **THRESHOLD)
    formats.export(sae, tmp_path / "a", to="saelens")
    inference = load_inference(tmp_path / "a", say=lambda line: None)
    tensors = {name: t for name, t in inference.named_buffers() if name != "threshold"}
    relu = type(inference)(type(inference.cfg)(d_in=12, d_sae=96, rule="relu", d_out=7), tensors)
    save_inference(relu, tmp_path / "b", to="saelens")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["architecture"] == "transcoder"
    x = tokens(20, 12)
    torch.testing.assert_close(formats.load(tmp_path / "b", k=4).encode(x), relu.encode(x))


def test_what_has_no_place_is_refused_by_name(tmp_path):
    sae, topk = trained(d_out=7, **THRESHOLD), trained(d_out=7, **TOPK)
    for made, to, said in (
        (sae, "dictionary_learning", "d_out=7: dictionary_learning has no place for a transcoder"),
        (topk, "saelens", "SAELens has no transcoder that keeps k features"),
        (topk, "sparsify", "d_out=7: sparsify has transcoders of d_out = d_in=12 only"),
    ):
        with pytest.raises(ValueError, match=said):
            formats.export(made, tmp_path / "theirs", to=to)
        assert not (tmp_path / "theirs").exists()
    with pytest.raises(ValueError, match=r"scale=0\.5: is of an SAE"):
        formats.export(sae, tmp_path / "theirs", to="saelens", scale=0.5)
    formats.export(sae, tmp_path / "theirs", to="saelens")
    with pytest.raises(ValueError, match=r"scale=0\.5: is of an SAE"):
        formats.load(tmp_path / "theirs", scale=0.5)
