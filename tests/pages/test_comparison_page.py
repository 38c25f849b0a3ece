"""The page of two SAEs side by side: what it takes from a comparison, what it links to, and what it refuses."""

import json
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from page_makers import HOSTILE, N_FEATURES, column, data_of

from sampled_sae import load_inference
from sampled_sae.cli import main
from sampled_sae.comparison import compare
from sampled_sae.pages import comparison_page as made_by
from sampled_sae.pages.comparison_page import comparison_page
from sampled_sae.pages.look_link import LookLink


def test_a_page_has_all_pairs_and_what_is_alone(found):
    data, _ = data_of(comparison_page(found, ("one", "two"), "acts"))
    m, on = found.matching, found.agreement
    pairs = data["pairs"]
    assert pairs["total"] == N_FEATURES
    assert [column(side, "<i4").tolist() for side in pairs["features"]] == [m.a.tolist(), m.b.tolist()]
    assert np.array_equal(column(pairs["cosine"]), m.cosine.numpy())
    assert column(pairs["shared"], "<i4").astype(bool).tolist() == (m.cosine >= 0.5).tolist()
    assert np.array_equal(column(pairs["jaccard"]), on.jaccard.astype("<f4"), equal_nan=True)
    assert np.array_equal(column(pairs["activation"]), on.activation_cosine.astype("<f4"), equal_nan=True)
    assert column(pairs["active"][1], "<i4").tolist() == on.active_b[m.b.numpy()].tolist()
    for side, (alone, nearest, active) in enumerate(
        zip(data["alone"], (m.nearest_a, m.nearest_b), (on.active_a, on.active_b))
    ):
        features = found.alone(side)
        assert alone["total"] == len(features)
        assert column(alone["features"], "<i4").tolist() == features.tolist()
        assert np.array_equal(column(alone["nearest"]), nearest.numpy()[features])
        assert column(alone["active"], "<i4").tolist() == active[features].tolist()
    assert sum(data["cosines"][0]) == N_FEATURES
    assert sum(data["cosines"][2]) == 80
    assert data["cosines"][0] == found.summary()["cosine_histogram"]
    assert sum(data["on_activations"]["jaccard"]) == int((~np.isnan(on.jaccard[(m.cosine >= 0.5).numpy()])).sum())
    assert data["about"]["activations"] == "acts"
    assert data["looks"] == [None, None]


def test_shares_of_tokens_by_cosine_are_quartiles(found):
    data, _ = data_of(comparison_page(found, ("one", "two")))
    cosine, jaccard = found.matching.cosine.numpy(), found.agreement.jaccard
    rows = data["on_activations"]["quartiles"]
    assert rows
    for centre, *quartiles in rows:
        own = jaccard[(cosine >= centre - 0.025) & (cosine < centre + 0.025) & ~np.isnan(jaccard)]
        assert len(own) >= made_by.FEWEST
        assert quartiles == pytest.approx(np.quantile(own, (0.25, 0.5, 0.75)).tolist(), rel=1e-3)


def test_without_activations_there_is_nothing_of_codes(root, other):
    a, b = (load_inference(folder, say=lambda line: None) for folder in (root / "run", other))
    data, _ = data_of(comparison_page(compare(a, b), ("one", "two")))
    assert data["on_activations"] is data["tokens"] is data["pairs"]["jaccard"] is data["alone"][0]["active"] is None
    assert data["pairs"]["active"] == [None, None]


def test_of_too_many_pairs_the_page_has_the_nearest(found, monkeypatch):
    monkeypatch.setattr(made_by, "MOST_ROWS", 10)
    data, _ = data_of(comparison_page(found, ("one", "two")))
    m = found.matching
    best = m.cosine.sort(descending=True, stable=True).indices[:10].sort().values
    assert data["pairs"]["total"] == N_FEATURES
    assert column(data["pairs"]["features"][0], "<i4").tolist() == m.a[best].tolist()
    assert len(column(data["pairs"]["jaccard"])) == 10
    assert column(data["alone"][1]["features"], "<i4").tolist() == found.alone(1)[:10].tolist()
    assert data["alone"][1]["total"] == len(found.alone(1))


def test_a_large_comparison_is_a_small_page(found):
    wide = 16_384
    order = torch.arange(wide)
    cosine = torch.linspace(-1, 1, wide)
    matching = replace(found.matching, a=order, b=order.flip(0), cosine=cosine, nearest_a=cosine, nearest_b=cosine)
    html = comparison_page(replace(found, matching=matching, agreement=None, widths=(wide, wide)), ("a", "b"))
    assert len(html) < 2_000_000


def test_links_and_tokens_come_from_the_pages_of_both(root, looked, found, tmp_path):
    look = LookLink.read(looked, tmp_path / "sub")
    assert look.d_sae == N_FEATURES
    own, _ = data_of(looked.read_text(encoding="utf-8"))
    keys = column(own["columns"]["keys"], "<i4").reshape(N_FEATURES, own["keys"])
    texts = [[None if word < 0 else own["words"][word] for word in row] for row in keys.tolist()]
    assert [[None if word < 0 else look.words[word] for word in row] for row in look.keys.tolist()] == texts
    data, _ = data_of(comparison_page(found, ("one", "two"), looks=(None, look)))
    assert data["looks"][1]["href"].startswith("./../")
    assert data["looks"][1]["href"].endswith("/look%25of%23a.html")
    assert (tmp_path / "sub" / unquote(data["looks"][1]["href"])).resolve() == looked.resolve()


def test_an_address_is_a_path_whatever_its_name(looked, tmp_path):
    (tmp_path / "javascript:alert(1)").mkdir()
    file = tmp_path / "javascript:alert(1)" / "look#1.html"
    file.write_bytes(looked.read_bytes())
    assert LookLink.read(file, tmp_path).href == "./javascript%3Aalert%281%29/look%231.html"


def test_what_is_no_page_of_an_sae_is_refused(looked, tmp_path):
    text = looked.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    end = text.index("</script>", start)
    data = json.loads(text[start:end])
    damaged = [
        "{}",
        "[]",
        "{",
        json.dumps({**data, "words": data["words"][:1]}),
        json.dumps({**data, "keys": 7}),
        json.dumps({**data, "columns": {**data["columns"], "counts": "?"}}),
    ]
    for content in (text.replace("sampled-sae", "other"), *(text[:start] + one + text[end:] for one in damaged)):
        file = tmp_path / "look.html"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"look\.html: is no page of an SAE that look wrote"):
            LookLink.read(file, tmp_path)


def test_the_command_writes_a_page_and_finds_the_pages_of_both(root, other, looked, tmp_path, capsys):
    line = ["compare", str(root / "run"), str(other), "--out", str(tmp_path / "out"), "--insist"]
    assert main([*line, "--a-look", str(looked), "--activations", str(root / "acts")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "comparison.html")
    data, _ = data_of((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert data["names"] == [f"{root.name}/run", f"{root.name}/other"]
    assert data["about"]["activations"] == f"{root.name}/acts"
    assert data["looks"][0]["href"].endswith("look%25of%23a.html")
    assert data["looks"][1] is None

    (other / "look.html").write_bytes(looked.read_bytes())
    line[line.index("--out") + 1] = str(tmp_path / "again")
    try:
        assert main(line) == 0
        said = (
            f"{other / 'look.html'}: is the page of an SAE of {N_FEATURES} features, {other} has 80: no links to it\n"
        )
        assert said in capsys.readouterr().out
        assert main([*line, "--b-look", str(looked)]) == 1
        wanted = f"{looked}: is the page of an SAE of {N_FEATURES} features, {other} has 80\n"
        assert capsys.readouterr().err.endswith(wanted)
    finally:
        (other / "look.html").unlink()
    assert main([*line, "--b-look", str(tmp_path / "none.html")]) == 1
    assert "none.html" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_replaced(root, other, tmp_path, capsys):
    (tmp_path / "comparison.html").write_text("mine")
    assert main(["compare", str(root / "run"), str(other), "--out", str(tmp_path)]) == 1
    assert "comparison.html: is of no comparison and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "comparison.html").read_text() == "mine"


def test_names_of_others_are_no_markup(found):
    html = comparison_page(found, (HOSTILE, "two"), HOSTILE)
    assert HOSTILE not in html
    assert data_of(html)[0]["names"] == [HOSTILE, "two"]
