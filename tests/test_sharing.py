"""A SampledSAE to the Hugging Face hub and back, its card, and folders of other libraries."""

import sys
from dataclasses import asdict

import pytest
import torch
from hub_stand_in import local_hub
from makers import make_sae, same_weights, tokens

from sampled_sae import SampledSAE, TrainConfig, formats, load_inference
from sampled_sae.cli import main
from sampled_sae.model_card import MARK, RunFacts, model_card
from sampled_sae.support.atomic_files import write_json

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with local_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


def an_sae(**changes):
    sae = make_sae(torch.float32, input_scale=0.25, **changes).eval()
    sae.calibrate(tokens(300, 12, dtype=torch.float32))
    return sae


def a_run(folder, sae, model="EleutherAI/pythia-160m"):
    """As `train` and `evaluate` leave it."""
    sae.save_pretrained(folder)
    about = {"model": model, "layer": 5, "context": 128, "source": "/home/me/secret.jsonl", "scale": 0.25}
    write_json(folder / "run.json", {"train": asdict(TrainConfig(steps=77)), "activations": about, "tokens": 9})
    write_json(folder / "evaluation.json", {"fvu": 0.123456, "l0": 31.97, "loss_recovered_zero": 0.98, "tokens": 4096})
    return folder


def test_there_and_back(tmp_path, hub):
    sae = an_sae()
    address = sae.push_to_hub("me/sae", run=a_run(tmp_path / "run", sae), token="hf_made", private=True)
    assert address.endswith(f"/me/sae/commit/{hub.commit_of('me/sae', 'main')}")
    assert hub.private == {"me/sae": True}
    assert set(hub.tokens) == {"Bearer hf_made"}
    assert set(hub.commits["me/sae"]["main"]) == {
        "README.md", "config.json", "sae.safetensors", "origin.json", "evaluation.json",
    }  # fmt: skip
    again = SampledSAE.from_pretrained("me/sae")
    assert same_weights(again, sae)
    assert again.cfg == sae.cfg
    assert not again.training
    line = []
    load_inference("me/sae", say=line.append)
    assert "model EleutherAI/pythia-160m, layer 5" in line[-1]
    assert not any(b"secret" in content for content in hub.commits["me/sae"]["main"].values())


def test_the_place_inside_a_block_is_said(tmp_path, hub):
    """Of an SAE that was trained where a hook names the place, not on the residual stream after a block."""
    sae, point = an_sae(), "gpt_neox.layers.3.mlp:out"
    run = a_run(tmp_path / "run", sae)
    about = {"model": "EleutherAI/pythia-160m", "layer": None, "point": point, "context": 128}
    write_json(run / "run.json", {"train": asdict(TrainConfig(steps=77)), "activations": about})
    sae.push_to_hub("me/sae", run=run)
    card = hub.commits["me/sae"]["main"]["README.md"].decode()
    assert "Activations of EleutherAI/pythia-160m at gpt\\_neox.layers.3.mlp:out." in card
    assert "residual stream" not in card
    line = []
    load_inference("me/sae", say=line.append)
    assert f"model EleutherAI/pythia-160m, layer 3 ({point})" in line[-1]


def test_revisions(hub):
    first, second = an_sae(), an_sae(seed=1)
    first.push_to_hub("me/sae")
    commit = hub.commit_of("me/sae", "main")
    second.push_to_hub("me/sae")
    second.push_to_hub("me/sae", revision="wide")
    first.push_to_hub("me/sae", revision="wide")
    for revision, sae in ((None, second), ("main", second), (commit, first), ("wide", first)):
        assert same_weights(SampledSAE.from_pretrained("me/sae", revision=revision), sae), revision
    with pytest.raises(ValueError, match=r"^me/sae: the hub did not give it \(RevisionNotFound|^me/sae: the hub did"):
        SampledSAE.from_pretrained("me/sae", revision="none")
    assert b'revision="wide"' in hub.commits["me/sae"]["wide"]["README.md"]


def test_metrics_of_another_sae_do_not_stay(tmp_path, hub):
    first, second = an_sae(), an_sae(seed=1)
    first.push_to_hub("me/sae", run=a_run(tmp_path / "run", first))
    hub.put("me/sae", {"notes.txt": b"mine"})
    second.push_to_hub("me/sae")
    assert set(hub.commits["me/sae"]["main"]) == {"README.md", "config.json", "sae.safetensors", "notes.txt"}


def test_the_card(tmp_path, hub):
    sae = an_sae(l=7.0)
    sae.push_to_hub("me/sae", run=a_run(tmp_path / "run", sae))
    text = hub.commits["me/sae"]["main"]["README.md"].decode()
    from huggingface_hub import ModelCard

    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "EleutherAI/pythia-160m"
    assert data["library_name"] == "sampled-sae"
    assert "sparse-autoencoder" in data["tags"]
    for row in ("FVU: squared error over variance | 0.12346", "l | 7", "steps | 77", "held-out tokens | 4096"):
        assert f"\n| {row} |\n" in text
    assert "after block 5" in text
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {"x": tokens(4, 12, dtype=torch.float32)}
    exec(code, names)
    assert torch.equal(names["x_hat"], sae.decode(sae.encode_sparse(names["x"])))


def test_a_card_that_somebody_wrote_stays(hub):
    sae = an_sae()
    sae.push_to_hub("me/sae")
    assert MARK.encode() in hub.commits["me/sae"]["main"]["README.md"]
    hub.put("me/sae", {"README.md": b"# By hand"})
    sae.push_to_hub("me/sae")
    assert hub.commits["me/sae"]["main"]["README.md"] == b"# By hand"
    hub.put("me/sae", {"README.md": MARK.encode()})
    sae.push_to_hub("me/sae")
    assert b"## Load" in hub.commits["me/sae"]["main"]["README.md"]


def test_names_in_a_card_are_no_markup():
    sae = an_sae()
    facts = RunFacts({"model_name": 'a\n---\nb: "c" <img src=x>/|d', "layer": 1}, {"x|y": "<script>"}, {})
    text = model_card("me/sae", sae.cfg, facts)
    assert "<img" not in text.replace("\\<", "")
    assert "| x\\|y | \\<script\\> |" in text
    assert "base_model" not in text
    assert "sampled-sae evaluate" in text


def test_what_would_be_lost_is_refused(tmp_path, hub):
    sae = an_sae()
    hub.put("me/model", {"config.json": b'{"architectures": ["GPT2LMHeadModel"]}'})
    with pytest.raises(ValueError, match=r"^me/model: its config\.json is of something else than a SampledSAE"):
        sae.push_to_hub("me/model")
    assert list(hub.commits["me/model"]["main"]) == ["config.json"]
    with pytest.raises(ValueError, match=r"run='.*other': holds another SAE than this one"):
        sae.push_to_hub("me/sae", run=a_run(tmp_path / "other", an_sae(seed=3)))
    with pytest.raises(ValueError, match=r"run='nowhere': no such folder"):
        sae.push_to_hub("me/sae", run="nowhere")
    with pytest.raises(ValueError, match=r"repository='sae': must be the name of a repository on the hub, owner/name"):
        sae.push_to_hub("sae")
    assert "me/sae" not in hub.commits
    with pytest.raises(ValueError, match=r"^forbidden/sae: the hub did not make it \(HfHubHTTPError: "):
        sae.push_to_hub("forbidden/sae")


def test_a_repository_without_an_sae_of_ours(hub):
    hub.put("me/other", {"cfg.json": b"{}", "config.json": b"{}"})
    with pytest.raises(ValueError, match=r"^me/other: the repository holds no SAE of this package at its root"):
        SampledSAE.from_pretrained("me/other")
    with pytest.raises(ValueError, match=r"^no/such: the hub did not give it"):
        SampledSAE.from_pretrained("no/such")


def test_a_folder_goes_first_and_has_no_revision(tmp_path, hub):
    sae = an_sae()
    an_sae(seed=4).push_to_hub("me/sae")
    sae.save_pretrained("me/sae")
    assert same_weights(SampledSAE.from_pretrained("me/sae"), sae)
    with pytest.raises(ValueError, match=r"revision='main': must be None for a folder, and me/sae is one"):
        SampledSAE.from_pretrained("me/sae", revision="main")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        SampledSAE.from_pretrained(tmp_path / "me" / "other")


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'^me/sae: writing to the hub needs .*pip install "sampled-sae\[hub\]"'):
        an_sae().push_to_hub("me/sae")
    with pytest.raises(ImportError, match=r'^me/sae: reading from the hub needs .*pip install "sampled-sae\[hub\]"'):
        SampledSAE.from_pretrained("me/sae")


@pytest.mark.parametrize("peer", formats.FORMATS)
def test_a_folder_of_another_library_names_what_reads_it(peer, tmp_path):
    sae = an_sae(l=None)
    formats.export(sae, tmp_path / "theirs", to=peer, inference="topk")
    with pytest.raises(ValueError, match=rf"is an SAE of {peer}; sampled-sae import \S+ OUT makes one of this package"):
        SampledSAE.from_pretrained(tmp_path / "theirs")
    assert main(["--quiet", "import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert same_weights(SampledSAE.from_pretrained(tmp_path / "ours"), sae)
