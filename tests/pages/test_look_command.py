"""`sampled-sae look`: what it writes from what it is given, and what it refuses."""

import json

import pytest
import torch
from page_makers import HOSTILE, N_FEATURES, column, command, data_of

from sampled_sae import ActivationStore
from sampled_sae.cli import main
from sampled_sae.lm.logit_lens import token_texts
from sampled_sae.pages.html import in_html


def look(root, out, *options):
    command("look", root / "run", root / "acts", f"--out {out}", *options)
    html = out.read_text(encoding="utf-8")
    return html, *data_of(html)


def failing(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    return capsys.readouterr().err


def test_the_page_of_a_run(root, tmp_path):
    html, data, details = look(root, tmp_path / "a.html", "--features 0:20 --contexts 4")
    counts = column(data["columns"]["counts"], "<i4")
    assert len(counts) == N_FEATURES
    assert data["measured"]["l0"] == pytest.approx(counts.sum() / data["measured"]["tokens"])
    assert data["measured"]["tokens"] == sum(ActivationStore.open(root / "acts").tokens)
    assert column(data["shown"], "<i4").tolist() == [one["feature"] for one in details] == list(range(20))
    assert data["evaluation"]["fvu"] == json.loads((root / "run" / "evaluation.json").read_text())["fvu"]
    assert len(data["curves"]["tokens"]) == len(data["curves"]["loss"]) == 20
    assert data["settings"]["training"]["steps"] == 40
    assert data["name"] == f"{root.name}/run"
    assert str(root) not in data["line"].partition("; model")[0]
    for one, count, greatest in zip(details, counts, column(data["columns"]["maxima"])):
        assert sum(one["histogram"]) == count
        assert len({found["row"] for found in one["top"]}) == len(one["top"]) == min(4, count)
        assert one["top"][0]["value"] == pytest.approx(greatest, rel=1e-3)
        assert len(one["raised"]) == 10
    again = tmp_path / "b.html"
    command("look", root / "run", root / "acts", f"--out {again}", "--features 0:20 --contexts 4")
    assert again.read_text(encoding="utf-8") == html


def test_no_token_is_markup_in_the_file(root, tmp_path):
    html, data, _ = look(root, tmp_path / "a.html")
    assert HOSTILE in data["words"]
    assert "<img" not in html
    assert html.count("</script>") == html.count("<script")
    assert in_html("</script>&\ud800") == '"\\u003c/script\\u003e\\u0026\\ud800"'


def test_the_page_loads_nothing(root, tmp_path):
    html, *_ = look(root, tmp_path / "a.html")
    (policy,) = [line for line in html.splitlines() if "Content-Security-Policy" in line]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    outside = ("http://", "https://", "src=", "@import", "url(")
    for named in ("http://www.w3.org/2000/svg", "img/src=x"):  # a namespace, and a token
        html = html.replace(named, "")
    assert [word for word in outside if word in html] == []


def test_without_a_model_tokens_are_numbers(root, tmp_path):
    _, data, details = look(root, tmp_path / "a.html", "--no-model")
    assert data["has"] == {"model": False, "lens": False, "text": True}
    assert set(data["words"]) <= {str(i) for i in range(32)}
    assert details[0]["raised"] == []


def test_activations_without_text_have_no_contexts(root, tmp_path, capsys):
    x = ActivationStore.open(root / "acts").first(500)
    ActivationStore.write(tmp_path / "bare", x)
    assert main([str(w) for w in ("look", root / "run", tmp_path / "bare", "--out", tmp_path / "a.html")]) == 0
    assert "names no language model" in capsys.readouterr().out
    data, details = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert data["has"] == {"model": False, "lens": False, "text": False}
    assert data["columns"]["keys"] is None
    assert details[0]["top"] == []
    assert sum(details[0]["histogram"]) == column(data["columns"]["counts"], "<i4")[details[0]["feature"]]


def test_codes_on_disk_are_looked_at_as_they_are(root, tmp_path):
    command("encode", root / "acts", tmp_path / "codes", f"--sae {root}/run")
    command("look", root / "run", tmp_path / "codes", f"--out {tmp_path}/b.html --features all")
    _, data, details = look(root, tmp_path / "a.html", "--features all")
    of_codes, from_codes = data_of((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert from_codes == details
    assert of_codes["measured"] == {**data["measured"], "fvu": None}
    assert of_codes["columns"]["rises"] is None


def test_an_sae_of_one_feature_has_a_page(root, tmp_path):
    command("train", root / "acts", tmp_path / "one", "--features 1 --k 1 --steps 2 --batch-size 128")
    command("look", tmp_path / "one", root / "acts", "--features all")
    data, details = data_of((tmp_path / "one" / "look.html").read_text(encoding="utf-8"))
    assert column(data["columns"]["neighbours"], "<i4").tolist() == [-1]
    assert details[0]["neighbours"] == details[0]["company"] == []


def test_a_page_of_few_tokens_says_so(root, tmp_path):
    _, data, _ = look(root, tmp_path / "a.html", "--tokens 1")
    assert data["measured"]["tokens"] == ActivationStore.open(root / "acts").tokens[0]


def test_tokens_that_are_all_alike_have_no_shares_of_a_loss(root, tmp_path):
    ActivationStore.write(tmp_path / "flat", torch.full((300, 12), 0.1))
    command("look", root / "run", tmp_path / "flat", f"--out {tmp_path}/a.html --no-model")
    data, _ = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert data["measured"]["fvu"] is None
    assert data["columns"]["rises"] is None


def test_a_feature_that_is_not_there_is_refused_before_anything_is_encoded(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sampled_sae.cli.look.encode_corpus", lambda *args, **options: pytest.fail("encodes"))
    told = failing(capsys, "look", root / "run", root / "acts", "--out", tmp_path / "a.html", "--features", "3,64")
    assert "--features 64: the SAE has 64 features, from 0 to 63" in told


def test_what_does_not_belong_together_is_refused(root, tmp_path, capsys):
    out = tmp_path / "a.html"
    ActivationStore.write(tmp_path / "wide", torch.randn(50, 7))
    assert "d_in=12" in failing(capsys, "look", root / "run", tmp_path / "wide", "--out", out)
    assert "--features 64: the SAE has 64 features" in failing(
        capsys, "look", root / "run", root / "acts", "--out", out, "--features", "60:65", "--no-model"
    )
    assert "is a folder; name a file with --out" in failing(
        capsys, "look", root / "run", root / "acts", "--out", tmp_path
    )
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    told = failing(capsys, "look", root / "run", root / "acts", "--out", kept)
    assert "is no page of this package and would be replaced" in told
    assert kept.read_text() == "mine"
    command("train", root / "acts", tmp_path / "other", f"--features {N_FEATURES} --k 4 --steps 2 --batch-size 128")
    command("encode", root / "acts", tmp_path / "codes", f"--sae {tmp_path}/other")
    told = failing(capsys, "look", root / "run", tmp_path / "codes", "--out", out)
    assert "codes of other weights than" in told
    assert "no such file" in failing(capsys, "look", root / "run", tmp_path / "none", "--out", out)
    assert not out.exists()


class _Pieces:
    """A tokenizer whose vocabulary is written as byte-level and sentence-piece ones are."""

    def __init__(self, pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i][0] for i in ids]

    def batch_decode(self, ids, clean_up_tokenization_spaces):
        return [self.pieces[i][1] for (i,) in ids]


def test_tokens_keep_their_space_and_what_is_no_text_is_shown_raw():
    pieces = [("▁the", "the"), ("the", "the"), ("Ġa", " a"), ("âĢ", "\ufffd"), ("<eos>", ""), (None, "")]
    assert token_texts(_Pieces(pieces), range(6)) == [" the", "the", " a", "âĢ", "<eos>", "#5"]
