"""Published SAEs that cannot be read: architectures without a place here, damaged files, pickles, no SAE at all."""

import json
import pickle

import numpy as np
import pytest
from published_makers import (
    F,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_qwen_scope,
    write_saelens,
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
    for folder, file in (
        (write_gemma_scope(tmp_path), "params.npz"),
        (write_qwen_scope(tmp_path), "layer3.sae.pt"),
        (write_dictionary_learning(tmp_path / "d", "AutoEncoder"), "ae.pt"),
        (write_gemma_scope_2(tmp_path), "params.safetensors"),
        (write_saelens(tmp_path / "s"), "sae_weights.safetensors"),
    ):
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}: truncated or not"):
            load_inference(folder)
        (folder / file).write_bytes(content[:3])
        with pytest.raises(ValueError, match=f"{file}: truncated or not"):
            load_inference(folder)


def test_truncated_arrays(tmp_path):
    folder = write_gemma_scope(tmp_path)
    whole = (folder / "params.npz").read_bytes()
    for share in (0.3, 0.9, 0.999):
        (folder / "params.npz").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"params.npz: truncated"):
            load_inference(folder)


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
