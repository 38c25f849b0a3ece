"""Published SAEs that cannot be read: architectures without a place here, damaged files, pickles, no SAE at all."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_sae
from published_makers import (
    F,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_qwen_scope,
    write_saelens,
    write_sparsify,
)

from sampled_sae import load_inference
from sampled_sae.formats.portable import silent


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("abstopk", "keeps features of negative activation"),
        ("matching_pursuit", "chooses one feature after another"),
        ("temporal", "looks at the tokens before"),
        ("new", "this package reads standard, topk, jumprelu"),
    ],
)
def test_architectures_that_have_no_place_are_refused_by_name(tmp_path, architecture, why):
    write_saelens(tmp_path, "standard")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": architecture}))
    with pytest.raises(ValueError, match=rf"cfg.json: architecture='{architecture}': {why}"):
        load_inference(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_activations": "covariance_whitening"}, "fold it in with SAELens first"),
        ({"normalize_activations": "batch"}, "must be one of 'none', 'layer_norm', 'constant_norm_rescale'"),
        ({"d_in": "12"}, r"d_in='12': must be of type int"),
        ({"d_sae": 95}, r"W_enc is \(12, 96\), must be \(12, 95\)"),
        ({"architecture": "transcoder", "d_out": 12, "apply_b_dec_to_input": True}, "a transcoder's b_dec"),
        ({"architecture": "topk"}, "k=None"),
        ({"architecture": "topk", "k": 200}, "k=200: must be at most d_sae=96"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(tmp_path, changes, message):
    write_saelens(tmp_path, "standard")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{message}"):
        load_inference(tmp_path)


def damaged_npz(folder, change):
    arrays = dict(np.load(folder / "params.npz"))
    change(arrays)
    np.savez(folder / "params.npz", **arrays)


def with_value(name, value):
    def change(arrays):
        arrays[name].flat[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("W_enc", np.nan), "W_enc holds NaN or inf"),
        (with_value("b_dec", np.inf), "b_dec holds NaN or inf"),
        (with_value("threshold", np.nan), "threshold holds NaN"),
        (lambda a: a.pop("threshold"), r"tensors missing \['threshold'\]"),
        (lambda a: a.update(more=a["b_dec"]), r"unknown \['more'\]"),
        (lambda a: a.update(b_enc=a["b_enc"][1:]), r"b_enc is \(95,\)"),
        (lambda a: a.update(W_enc=a["b_enc"]), "must hold the matrices"),
        (lambda a: a.update(b_enc=np.array([print] * F, dtype=object)), "not an .npz file of plain arrays"),
        (lambda a: a.update(b_enc=a["b_enc"].astype(np.int32)), "b_enc is torch.int32"),
    ],
    ids=range(9),
)
def test_damaged_arrays(tmp_path, change, message):
    folder = write_gemma_scope(tmp_path)
    damaged_npz(folder, change)
    with pytest.raises(ValueError, match=rf"params.npz: .*{message}"):
        load_inference(folder)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(Harmful()), b"\x93NUMPY"], ids=range(4))
def test_files_that_are_none(tmp_path, content):
    """Nothing is unpickled but tensors."""
    said = r"truncated or not(?!.*weights_only)"  # no word on how to unpickle it all the same
    for folder, file in (
        (write_gemma_scope(tmp_path), "params.npz"),
        (write_qwen_scope(tmp_path), "layer3.sae.pt"),
        (write_dictionary_learning(tmp_path / "d", "AutoEncoder"), "ae.pt"),
        (write_gemma_scope_2(tmp_path), "params.safetensors"),
        (write_saelens(tmp_path / "s"), "sae_weights.safetensors"),
    ):
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s){file}: {said}"):
            load_inference(folder)
        (folder / file).write_bytes(content[:3])
        with pytest.raises(ValueError, match=f"(?s){file}: {said}"):
            load_inference(folder)


def test_truncated_arrays(tmp_path):
    folder = write_gemma_scope(tmp_path)
    whole = (folder / "params.npz").read_bytes()
    for share in (0.3, 0.9, 0.999):
        (folder / "params.npz").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"params.npz: truncated"):
            load_inference(folder)


def test_damaged_compressed_arrays(tmp_path):
    folder = write_gemma_scope(tmp_path)
    np.savez_compressed(folder / "params.npz", **dict(np.load(folder / "params.npz")))
    whole = bytearray((folder / "params.npz").read_bytes())
    whole[60:80] = b"\xff" * 20
    (folder / "params.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"params.npz: truncated"):
        load_inference(folder)


def test_ours_without_a_threshold_to_rely_on(tmp_path):
    sae = make_sae(torch.float32)
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sae\.safetensors: sae\.threshold was never set: .*sae\.calibrate\(x\)"):
        load_inference(tmp_path)
    sae.threshold.fill_(0.5)
    sae.threshold_steps.fill_(2)
    sae.save_pretrained(tmp_path)
    said = []
    assert float(load_inference(tmp_path, say=said.append).threshold) == 0.5
    assert "running mean" in said[0]
    make_sae(torch.float32, l=None, select="token").save_pretrained(tmp_path)
    assert load_inference(tmp_path, say=silent).cfg.rule == "topk"


def test_k_is_refused_where_the_files_have_the_rule(tmp_path):
    with pytest.raises(ValueError, match=r"k=3: is for qwen_scope alone; files in the layout 'saelens'"):
        load_inference(write_saelens(tmp_path, "topk"), k=3)


def test_places_that_hold_no_sae(tmp_path):
    with pytest.raises(ValueError, match=r"no SAE in a known layout; must hold sae_weights.safetensors and cfg.json"):
        load_inference(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere at all: no such folder, and no repository of the form owner/name"):
        load_inference("nowhere at all")
    with pytest.raises(ValueError, match=r"there: no such folder or file"):
        load_inference(tmp_path, "there")
    write_saelens(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="holds files of several layouts: saelens, gemma_scope; name one with layout="):
        load_inference(tmp_path)
    assert load_inference(tmp_path, layout="saelens", say=silent).cfg.d_sae == F
    with pytest.raises(ValueError, match="layout='keras'"):
        load_inference(tmp_path, layout="keras")


def test_folders_of_many_saes_say_which_they_hold(tmp_path):
    for transcode in (True, False):
        write_sparsify(tmp_path, transcode)
    with pytest.raises(ValueError, match=r"holds SAEs in layers\.5, layers\.5\.mlp: name one with at="):
        load_inference(tmp_path)
    assert load_inference(tmp_path, Path("/layers.5/"), say=silent).cfg.d_sae == F
    with pytest.raises(ValueError, match=r"sae\.safetensors: is a file; name the folder that holds it"):
        load_inference(tmp_path / "layers.5" / "sae.safetensors")
    for n in range(6):
        write_qwen_scope(tmp_path / "more", str(n))
    with pytest.raises(ValueError, match=r"more: holds SAEs in 0, 1, 2, 3, 4, \.\.\.: name one with at="):
        load_inference(tmp_path / "more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": 3}, "source=3: must be a str or a path"),
        ({"source": ""}, "source='': must name something"),
        ({"at": 3}, "at=3: must be a str or a path"),
        ({"dtype": "float16"}, "dtype='float16': must be one of torch.float16"),
        ({"device": "cuda:99"}, "device='cuda:99': torch .* GPUs here"),
        ({"device": "toaster"}, "device='toaster': must be 'cpu', 'cuda' or 'cuda:N'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(tmp_path, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_inference(**{"source": write_saelens(tmp_path), **arguments})


@pytest.mark.parametrize("name", ["transcode", "skip_connection"])
def test_a_word_is_no_flag(tmp_path, name):
    folder = write_sparsify(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, name: "no"}))
    with pytest.raises(ValueError, match=f"cfg.json: {name}='no': must be of type bool"):
        load_inference(folder)


def test_sparse_tensors_are_refused(tmp_path):
    folder = write_dictionary_learning(tmp_path, "AutoEncoder")
    state = torch.load(folder / "ae.pt")
    torch.save({**state, "encoder.weight": state["encoder.weight"].to_sparse()}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt: encoder\.weight is torch\.sparse_coo of torch\.float32, must"):
        load_inference(folder)
