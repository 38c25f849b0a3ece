"""Two SAEs side by side: what is shared, agreement of codes, the command."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from makers import D, make_sae, tokens, write_store
from published_makers import write_gemma_scope

from sampled_sae import load_inference
from sampled_sae.cli import main
from sampled_sae.comparison import compare
from sampled_sae.comparison.report import plot
from sampled_sae.support.atomic_files import read_json, write_json

scipy = pytest.importorskip("scipy")


def test_all_features_of_an_sae_are_shared_with_itself(two):
    sae = load_inference(two[0], say=lambda line: None)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.3, 3, 96)[:, None])
    found = compare(sae, sae, same=1)
    assert found.summary()["shared"] == 96
    assert found.alone(0).tolist() == found.alone(1).tolist() == []


@pytest.mark.parametrize("n", [1, 50])
def test_tokens_that_are_all_alike_have_no_fvu(two, n):
    a, b = (load_inference(folder, say=lambda line: None) for folder in two)
    on = compare(a, b, torch.full((n, D), 0.25)).agreement
    assert all(np.isnan(on.fvu))
    assert on.tokens == n


def test_a_transcoder_is_compared_without_activations(tmp_path, capsys, monkeypatch):
    at = write_gemma_scope(tmp_path, "gemma-scope-2b-pt-transcoders")
    store = write_store(tmp_path / "acts")
    command = ["compare", str(at), str(at), "--insist", "--out", str(tmp_path / "out")]
    assert main([*command, "--activations", str(store)]) == 1
    wanted = f"{at}: is a transcoder, whose reconstructions are of other activations; leave out --activations\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert main(command) == 0
    sae = load_inference(at, say=lambda line: None)
    monkeypatch.setattr(sys.modules["sampled_sae.comparison.compare"], "match_features", None)
    with pytest.raises(ValueError, match="a: is a transcoder"):
        compare(sae, sae, torch.ones(3, sae.cfg.d_in))


@pytest.fixture
def two(tmp_path):
    """SAEs with every third feature of A in B, in another order."""
    first = make_sae(torch.float32).eval()
    second = make_sae(torch.float32, seed=1, d_sae=80).eval()
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec"):
            mine, theirs = getattr(first, name), getattr(second, name)
            if name == "W_enc":
                mine, theirs = mine.t(), theirs.t()
            theirs[:32] = mine[::3].flip(0)
        second.b_dec.copy_(first.b_dec)
    for name, sae in (("a", first), ("b", second)):
        sae.calibrate(tokens(500, D, dtype=torch.float32))
        sae.save_pretrained(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_agreement_by_dense_codes(two):
    a, b = (load_inference(folder, say=lambda line: None) for folder in two)
    x = tokens(150, D, dtype=torch.float32)
    found = compare(a, b, x, batch_size=64)
    m, on = found.matching, found.agreement
    shared = m.cosine >= 0.7
    assert set(zip(range(0, 96, 3), range(31, -1, -1))) <= set(zip(m.a[shared].tolist(), m.b[shared].tolist()))
    of_a, of_b = a.encode(x).double(), b.encode(x).double()
    fires_a, fires_b = of_a[:, m.a] > 0, of_b[:, m.b] > 0
    both, either = (fires_a & fires_b).sum(0), (fires_a | fires_b).sum(0)
    np.testing.assert_allclose(on.jaccard, (both / either).numpy(), equal_nan=True)
    norms = of_a[:, m.a].norm(dim=0) * of_b[:, m.b].norm(dim=0)
    wanted = (of_a[:, m.a] * of_b[:, m.b]).sum(0) / norms
    np.testing.assert_allclose(on.activation_cosine, wanted.numpy(), rtol=1e-5, equal_nan=True)
    assert on.active_a.tolist() == (of_a > 0).sum(0).tolist()
    active = (of_a > 0).sum(1) + (of_b > 0).sum(1)
    overlap = torch.where(active > 0, 2 * (fires_a & fires_b)[:, shared].sum(1) / active.clamp(min=1), 1.0)
    assert on.overlap == pytest.approx(float(overlap.mean()))
    assert on.l0 == (pytest.approx(float((of_a > 0).sum() / 150)), pytest.approx(float((of_b > 0).sum() / 150)))
    x_hats = [sae(x).x_hat for sae in (a, b)]
    deviations = (x - x.mean(0)).square().sum()
    assert on.fvu == tuple(pytest.approx(float((x - x_hat).square().sum() / deviations), rel=1e-5) for x_hat in x_hats)
    wanted = torch.nn.functional.cosine_similarity(*x_hats).mean()
    assert on.x_hat_cosine == pytest.approx(float(wanted), rel=1e-5)


def test_the_summary(two):
    a, b = (load_inference(folder, say=lambda line: None) for folder in two)
    x = tokens(150, D, dtype=torch.float32)
    found = compare(a, b, x, same=0.99)
    summary = found.summary()
    assert summary["shared"] == 32
    assert summary["alone"] == [64, 48]
    assert found.alone(0).tolist() == [j for j in range(96) if j % 3]
    assert found.alone(1).tolist() == list(range(32, 80))
    assert sum(summary["cosine_histogram"]) == summary["pairs"] == 80
    entries = (a.encode(x) > 0).sum(0)
    alone = entries[torch.arange(96) % 3 > 0]
    on = summary["on_activations"]
    assert on["alone_share_of_entries"][0] == pytest.approx(float(alone.sum() / entries.sum()))
    assert on["alone_active"][0] == int((alone > 0).sum())
    assert compare(a, a, x).summary()["on_activations"]["overlap"] == 1
    assert "on_activations" not in compare(a, b).summary()


def said(capsys):
    return capsys.readouterr()


def test_the_command(two, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    store = write_store(tmp_path / "acts")
    out = tmp_path / "out"
    command = ["compare", *map(str, two), "--activations", str(store), "--out", str(out), "--same", "0.99"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| shared: cosine of at least 0.99 |  |  | 32 |" in printed
    assert "Matched by: Hungarian method (scipy.optimize.linear_sum_assignment)." in printed
    assert (out / "comparison.md").read_text() in printed
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    summary = read_json(out / "comparison.json")
    assert (summary["a"], summary["b"]) == tuple(map(str, two))
    assert summary["on_activations"]["tokens"] == 150
    with open(out / "matches.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 96
    assert sum(line["b"] == "" for line in lines) == 16
    assert {
        (int(line["a"]), int(line["b"])) for line in lines if line["cosine"] and float(line["cosine"]) > 0.99
    } == set(zip(range(0, 96, 3), range(31, -1, -1)))
    assert main(command) == 0, "the same comparison again"
    capsys.readouterr()
    assert main(["compare", str(two[1]), str(two[0]), "--out", str(out)]) == 1
    assert f"{out}: holds the comparison of {two[0]} and {two[1]} on {store}; name another" in capsys.readouterr().err
    assert read_json(out / "comparison.json") == summary


@pytest.mark.parametrize("name", ["comparison.md", "matches.csv", "comparison.png"])
def test_files_of_something_else_are_not_replaced(two, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["compare", *map(str, two), "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / name}: is of no comparison and would be replaced" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_an_sae_of_another_library(two, tmp_path, capsys):
    at = write_gemma_scope(tmp_path)
    assert main(["compare", str(two[0]), str(at), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["pairs"] > 0
    capsys.readouterr()


def test_saes_of_different_activations_are_refused(two, tmp_path, capsys):
    for folder, layer in zip(two, (3, 4)):
        write_json(folder / "origin.json", {"model_name": "EleutherAI/pythia-70m", "layer": layer})
    command = ["compare", *map(str, two), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    wanted = (
        f"sampled-sae compare: {two[1]} reads layer 4, {two[0]} reads layer 3; take the same, or insist with --insist"
    )
    assert capsys.readouterr().err == wanted + "\n"
    assert not (tmp_path / "out").exists()
    assert main([*command, "--insist"]) == 0
    store = write_store(tmp_path / "acts", model="EleutherAI/pythia-70m", layer=9)
    assert main([*command[:3], "--activations", str(store), "--out", str(tmp_path / "other")]) == 1
    capsys.readouterr()


def test_widths_that_differ(two, tmp_path, capsys):
    wide, sae = tmp_path / "wide", make_sae(torch.float32, d_in=16)
    sae.calibrate(tokens(50, 16, dtype=torch.float32))
    sae.save_pretrained(wide)
    assert main(["compare", str(two[0]), str(wide), "--out", str(tmp_path / "out")]) == 1
    assert f"{wide}: its decoder rows are 16 wide, those of {two[0]} 12" in capsys.readouterr().err
    store = write_store(tmp_path / "acts", d=16)
    assert main(["compare", *map(str, two), "--activations", str(store)]) == 1
    assert f"{two[0]}: d_in=12, but the activations in {store} have 16" in capsys.readouterr().err


def test_the_plot_has_all_cosines_and_names_as_they_are(two, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kind: (drawn.append(self), path.touch()))
    a, b = (load_inference(folder, say=lambda line: None) for folder in two)
    found = compare(a, b)
    found.matching.cosine[:7] = -0.51
    plot(found, ("a$\\frac$", "b"), tmp_path)
    (axis,), (legend,) = drawn[0].axes, drawn[0].legends
    assert axis.get_xlim() == (-0.525, 1)
    assert sum(bar.get_height() for bar in axis.patches[:80] if bar.get_x() < -0.5) == 7
    assert legend.get_texts()[1].get_text() == "nearest, of a\\$\\frac\\$"


def test_a_name_in_dollars_is_drawn(two, tmp_path):
    pytest.importorskip("matplotlib")
    sae = load_inference(two[0], say=lambda line: None)
    assert plot(compare(sae, sae), ("a$\\frac$", "b"), tmp_path).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", *map(str, two), "--out", str(tmp_path / "out")]) == 0
    assert "No plot without matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out" / "comparison.png").exists()
