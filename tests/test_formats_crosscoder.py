"""Crosscoders in the files of dictionary_learning and back, and what has no place for them."""

import json

import pytest
import torch
from makers import make_sae, same_weights, tokens

from sampled_sae import formats, load_inference
from sampled_sae.cli import main

L, D, F = 3, 4, 96
NAN = torch.full((L, D), torch.nan)


def make(dtype=torch.float32, **changes):
    sae = make_sae(dtype, d_in=D, layers=L, l=None, **changes)
    sae.calibrate(batch(sae), 4)
    return sae.eval()


def batch(sae, n=80):
    return tokens(n, L, D, dtype=sae.W_dec.dtype)


def theirs(folder, x):
    """(codes, reconstruction) as BatchTopKCrossCoder of dictionary_learning makes them of its file."""
    state = torch.load(folder / "ae.pt", weights_only=True)
    mean, std, factor = (state[f"activation_{name}"] for name in ("mean", "std", "global_scale"))
    normal = not bool(mean.isnan().any() or std.isnan().any())
    x = (x - mean) * factor if normal else x
    f = torch.relu(torch.einsum("bld,ldf->bf", x, state["encoder.weight"]) + state["encoder.bias"])
    norms = state["decoder.weight"].norm(dim=2)
    weight = {1: norms.sum(0), 2: norms.square().sum(0).sqrt(), 4: torch.ones(())}[int(state["code_normalization_id"])]
    f = f * (f * weight > state["threshold"])
    x_hat = torch.einsum("bf,lfd->bld", f, state["decoder.weight"]) + state["decoder.bias"]
    return f * weight, x_hat / (factor + 1e-8) + mean if normal else x_hat


def write(folder, normalization=1, dict_class="BatchTopKCrossCoder", **changes):
    """A file as dictionary_learning's training leaves it: decoder norms of any size."""
    state = {
        "encoder.weight": tokens(L, D, F, dtype=torch.float32, seed=2),
        "encoder.bias": 0.1 * tokens(F, dtype=torch.float32, seed=3),
        "decoder.weight": 0.3 * tokens(L, F, D, dtype=torch.float32, seed=4),
        "decoder.bias": tokens(L, D, dtype=torch.float32, seed=5),
        "k": torch.tensor(5, dtype=torch.int32),
        "threshold": torch.tensor(6.0),
        "code_normalization_id": torch.tensor(normalization),
        "activation_mean": NAN,
        "activation_std": NAN,
        "activation_global_scale": torch.tensor(1.0),
        "target_rms": torch.tensor(1.0),
        **changes,
    }
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "k": 5, "layer": 3, "lm_name": "made"}
    folder.mkdir(exist_ok=True)
    torch.save({name: t for name, t in state.items() if t is not None}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


def test_an_encoder_made_of_decoder_rows_read_the_other_way_round(tmp_path):
    """dictionary_learning's crosscoders begin so, and torch.save keeps what stands where in memory."""
    W = tokens(L, F, D, dtype=torch.float32, seed=2).transpose(1, 2)
    plain, turned = (write(tmp_path / str(i), **{"encoder.weight": w}) for i, w in enumerate((W.contiguous(), W)))
    assert same_weights(formats.load(plain), formats.load(turned))


@pytest.mark.parametrize(
    "changes",
    [{}, {"input_scale": 0.37}, {"input_scale": (0.5, 2.0, 1.0)}, {"apply_b_dec_to_input": True}, {"groups": (9, F)}],
    ids=str,
)
def test_ours_there_and_back(tmp_path, changes):
    sae = make(**changes)
    x = batch(sae)
    said = []
    formats.export(sae, tmp_path, to="dictionary_learning", origin=formats.Origin("made", 3), say=said.append)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    by_layer = isinstance(sae.cfg.input_scale, tuple)
    assert trainer["code_normalization"] == ("NONE" if by_layer else "CROSSCODER")
    assert (trainer["num_layers"], trainer["activation_dim"]) == (L, D)
    codes, x_hat = theirs(tmp_path, x)
    units = 1.0 if by_layer else sae.cfg.input_scale
    torch.testing.assert_close(codes * units, sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    if not changes:
        state = torch.load(tmp_path / "ae.pt", weights_only=True)
        assert torch.equal(state["encoder.weight"].flatten(0, 1), sae.W_enc)
        assert torch.equal(state["decoder.weight"].transpose(0, 1).flatten(1), sae.W_dec)
        assert torch.equal(state["decoder.bias"].flatten(), sae.b_dec)
        assert torch.equal(state["threshold"], sae.threshold)
        assert said == []
    again = formats.load(tmp_path)
    assert again.cfg == sae.cfg
    assert same_weights(sae, again)
    before = (tmp_path / "ae.pt").read_bytes()
    formats.export(again, tmp_path, to="dictionary_learning", origin=formats.Origin("made", 3))
    assert (tmp_path / "ae.pt").read_bytes() == before
    # without what stands beside it, the file alone has the function
    (tmp_path / "sampled_sae.safetensors").unlink()
    alone = formats.load(tmp_path)
    assert (alone.cfg.layers, alone.cfg.d_in, alone.cfg.groups) == (L, D, sae.cfg.groups)
    torch.testing.assert_close(alone(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    if not changes:
        assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), sae.parameters()))


@pytest.mark.parametrize("normalization", [1, 2, 4])
def test_theirs_is_read(tmp_path, normalization):
    write(tmp_path, normalization)
    said = []
    sae = formats.load(tmp_path, say=said.append)
    x = batch(sae)
    codes, x_hat = theirs(tmp_path, x)
    assert 0 < (codes > 0).sum() < codes.numel()
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x).x_hat, x_hat)
    assert (sae.cfg.k, sae.cfg.layers, sae.cfg.apply_b_dec_to_input) == (5, L, False)
    assert any("decoder norms are folded" in line for line in said) == (normalization != 4)
    formats.export(sae, tmp_path / "again", to="dictionary_learning")
    codes_again, x_hat_again = theirs(tmp_path / "again", x)
    torch.testing.assert_close(codes_again, codes)
    torch.testing.assert_close(x_hat_again, x_hat)
    if normalization == 4:
        states = [torch.load(at / "ae.pt", weights_only=True) for at in (tmp_path, tmp_path / "again")]
        for name, t in states[0].items():
            torch.testing.assert_close(states[1][name], t, rtol=0, atol=0, equal_nan=True)


def test_their_normalizer_of_activations(tmp_path):
    normal = {"activation_mean": tokens(L, D, dtype=torch.float32, seed=7), "activation_std": torch.ones(L, D)}
    write(tmp_path, 1, **normal, activation_global_scale=torch.tensor(0.25), threshold=torch.tensor(2.0))
    sae = formats.load(tmp_path)
    x = batch(sae)
    codes, x_hat = theirs(tmp_path, x)
    assert sae.cfg.input_scale == 0.25
    assert 0 < (codes > 0).sum() < codes.numel()
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-4, atol=1e-4)
    write(tmp_path, 1, **normal, activation_global_scale=torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"ae\.pt: activation_mean is .*activation_global_scale=0\.0"):
        formats.load(tmp_path)


def test_an_older_file_and_one_of_the_l1_kind(tmp_path):
    old = write(tmp_path / "old", code_normalization_id=None, activation_mean=None, activation_std=None)
    said = []
    sae = formats.load(old, say=said.append)
    assert any("names no code_normalization" in line for line in said)
    torch.testing.assert_close(sae.layer_norms().sum(1), torch.ones(F))
    bare = {"k": None, "threshold": None, "code_normalization_id": None, "activation_mean": None, "target_rms": None}
    write(tmp_path / "l1", dict_class="CrossCoder", **bare, activation_std=None, activation_global_scale=None)
    with pytest.raises(ValueError, match="k: the file does not say it"):
        formats.load(tmp_path / "l1")
    sae = formats.load(tmp_path / "l1", k=20)
    state = torch.load(tmp_path / "l1" / "ae.pt", weights_only=True)
    f = torch.relu(torch.einsum("bld,ldf->bf", batch(sae), state["encoder.weight"]) + state["encoder.bias"])
    torch.testing.assert_close(sae.encode(batch(sae)), f)
    assert torch.equal(sae.W_enc, state["encoder.weight"].flatten(0, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalization": 3}, r"ae\.pt: code_normalization=MIXED: this package reads CROSSCODER, SAE and NONE"),
        ({"normalization": 5, "threshold": torch.zeros(L)}, r"ae\.pt: threshold is \(3,\), must be \(\)"),
        ({"normalization": 5}, "code_normalization=DECOUPLED"),
        ({"normalization": 9}, "code_normalization_id=9"),
        ({"encoder.weight": torch.zeros(L * D, F)}, r"encoder\.weight is \(12, 96\), must be \(layers, "),
        ({"decoder.weight": torch.zeros(L, F, D + 1)}, r"decoder\.weight is \(3, 96, 5\)"),
        ({"decoder.weight": torch.zeros(L, F, D)}, "has no row in any layer for 96 features"),
        ({"decoder.bias": torch.full((L, D), torch.inf)}, r"decoder\.bias holds NaN or inf"),
        ({"encoder.bias": None}, r"tensors missing \['encoder\.bias'\]"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, said):
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        formats.load(tmp_path)


def test_sizes_that_the_files_tell_apart(tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"]["activation_dim"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: trainer\.activation_dim=5, but ae\.pt has 4"):
        formats.load(tmp_path)


def test_what_no_file_holds_is_refused(tmp_path):
    sae = make()
    for to in ("saelens", "sparsify"):
        with pytest.raises(ValueError, match=f"layers=3: {to} has no place for a crosscoder"):
            formats.export(sae, tmp_path / to, to=to)
        assert not (tmp_path / to).exists()
    with pytest.raises(ValueError, match=r"scale=2\.0: is of an SAE; a crosscoder of 3 layers"):
        formats.export(sae, tmp_path / "a", to="dictionary_learning", scale=2.0)
    with pytest.raises(ValueError, match="inference='topk': dictionary_learning's crosscoders"):
        formats.export(sae, tmp_path / "a", to="dictionary_learning", inference="topk")
    with pytest.raises(ValueError, match=r"scale=2\.0: is of an SAE"):
        formats.load(write(tmp_path / "b"), scale=2.0)


def test_by_command_and_for_inference(tmp_path, capsys):
    sae = make(input_scale=(0.5, 2.0, 1.0))
    x = batch(sae)
    sae.save_pretrained(tmp_path / "ours")
    for argv in (
        ["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "dictionary_learning"],
        ["import", str(tmp_path / "theirs"), str(tmp_path / "again")],
    ):
        assert main(argv) == 0
    assert "the weights of each layer take its factor" in capsys.readouterr().out
    for name in ("ours", "theirs", "again"):
        found = load_inference(tmp_path / name)
        assert found.cfg.d_in == L * D
        torch.testing.assert_close(found.encode(x.flatten(1)), sae.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found(x.flatten(1)).x_hat.view(x.shape), sae(x).x_hat, rtol=1e-4, atol=1e-4)
