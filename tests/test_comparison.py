"""Two SAEs side by side: pairs of features against brute force, agreement of codes, the command."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from makers import D, make_sae, tokens, write_store
from published_makers import write_gemma_scope

from sampled_sae import load_inference
from sampled_sae.cli import main
from sampled_sae.comparison import compare, match_features, matching
from sampled_sae.comparison.report import plot
from sampled_sae.support.atomic_files import read_json, write_json

scipy = pytest.importorskip("scipy")


def rows(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2)


@pytest.mark.parametrize(("n_a", "n_b"), [(6, 6), (4, 6), (6, 4), (1, 3)])
def test_hungarian_is_the_best_of_all_matchings(n_a, n_b):
    a, b = rows(n_a), rows(n_b, seed=1)
    found, cosine = match_features(a, b, "hungarian"), cosines(a, b)
    small, matrix = min(n_a, n_b), cosine.t() if n_a > n_b else cosine
    matchings = itertools.permutations(range(max(n_a, n_b)), small)
    best = max(sum(matrix[i, j] for i, j in enumerate(chosen)) for chosen in matchings)
    assert float(found.cosine.sum()) == pytest.approx(float(best), rel=1e-5)
    assert torch.allclose(found.cosine.double(), cosine[found.a, found.b], atol=1e-6)
    assert len(set(found.a.tolist())) == len(set(found.b.tolist())) == small
    assert torch.allclose(found.nearest_a.double(), cosine.amax(1), atol=1e-6)
    assert torch.allclose(found.nearest_b.double(), cosine.amax(0), atol=1e-6)


def brute_greedy(cosine, allowed):
    taken_a, taken_b, pairs = set(), set(), []
    order = sorted(itertools.product(*map(range, cosine.shape)), key=lambda pair: (-float(cosine[pair]), pair))
    for i, j in order:
        if allowed[i, j] and i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            pairs.append((i, j))
    return sorted(pairs)


@pytest.mark.parametrize("candidates", [1, 3, 40])
@pytest.mark.parametrize("block_bytes", [1, 400, 1 << 27])
def test_greedy_by_hand(candidates, block_bytes, monkeypatch):
    monkeypatch.setattr(matching, "CANDIDATES", candidates)
    monkeypatch.setattr(matching, "_BLOCK_BYTES", block_bytes)
    a, b = rows(23), rows(31, seed=1)
    cosine = cosines(a, b)
    allowed = torch.zeros_like(cosine, dtype=torch.bool)
    allowed.scatter_(1, cosine.topk(min(candidates, 31), dim=1).indices, True)
    allowed.scatter_(0, cosine.topk(min(candidates, 23), dim=0).indices, True)
    found = match_features(a, b, "greedy")
    assert list(zip(found.a.tolist(), found.b.tolist())) == brute_greedy(cosine, allowed)
    assert torch.allclose(found.cosine.double(), cosine[found.a, found.b], atol=1e-6)
    assert torch.allclose(found.nearest_b.double(), cosine.amax(0), atol=1e-6)
    back = match_features(b, a, "greedy")
    assert sorted(zip(back.b.tolist(), back.a.tolist())) == list(zip(found.a.tolist(), found.b.tolist()))


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_the_same_features_in_another_order_and_length(method):
    a = rows(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    found = match_features(a, 7 * a[order].to(torch.bfloat16), method)
    assert torch.equal(order[found.b], found.a)
    assert (found.cosine > 0.999).all()


@pytest.mark.parametrize("method", ["hungarian", "greedy"])
def test_rows_of_any_length(method):
    a, lengths = rows(20), torch.logspace(-200, 200, 20, dtype=torch.float64)[:, None]
    found = match_features(a.double() * lengths, a, method)
    assert torch.equal(found.a, found.b)
    assert (found.cosine > 0.999).all()
    a[3] = 0
    assert match_features(a, a, method).cosine[3] == 0


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


def test_what_was_done_is_said(monkeypatch):
    a, b = rows(5), rows(5, seed=1)
    assert match_features(a, b).how == "Hungarian method (scipy.optimize.linear_sum_assignment)"
    assert match_features(a, b, "greedy").how == "greedy among the 32 nearest of each feature"
    monkeypatch.setattr(matching, "MOST_PAIRS", 24)
    assert match_features(a, b).how.endswith(", for 5 by 5 features are many for the Hungarian method")
    monkeypatch.setattr(matching, "MOST_PAIRS", 25)
    monkeypatch.setattr(matching.importlib.util, "find_spec", lambda name: None)
    assert match_features(a, b).how.endswith(', for scipy is not installed: pip install "sampled-sae[compare]"')
    with pytest.raises(ImportError, match=r'needs scipy: pip install "sampled-sae\[compare\]"'):
        match_features(a, b, "hungarian")


def test_bad_rows():
    for a, b, method, said in (
        (rows(3), rows(3), "best", r"method='best': must be one of 'auto', 'hungarian', 'greedy'"),
        (rows(3), rows(3, 5), "auto", r"rows_b=tensor \(3, 5\): must be as wide as rows_a, 6"),
        (rows(3), torch.zeros(0, 6), "auto", r"rows_b=tensor \(0, 6\): must be a floating tensor \[F, d\]"),
        (rows(3), torch.full((3, 6), torch.nan), "hungarian", r"rows_b: 18 of 18 values are NaN or inf"),
        (torch.full((3, 6), -torch.inf), rows(3), "greedy", r"rows_a: 18 of 18 values are NaN or inf"),
        (torch.ones(3, 6, dtype=torch.int64), rows(3), "auto", r"rows_a=tensor \(3, 6\): must be a floating"),
    ):
        with pytest.raises(ValueError, match=said):
            match_features(a, b, method)


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
