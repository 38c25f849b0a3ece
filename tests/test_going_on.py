"""Trainings that begin with the weights of an SAE there is, and finished ones that take more steps."""

import re
from dataclasses import replace

import pytest
import torch
from makers import D, begun_training, make_sae, same_weights, tokens

from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae.cli import main
from sampled_sae.formats.circuit_tracer import export_transcoder
from sampled_sae.training.training_run import METRICS

TRAIN = TrainConfig(steps=8, batch_size=32, checkpoint_every=4, log_every=2, lr=3e-3)
X = 2 * tokens(320, D, dtype=torch.float32, seed=3) + 1


def initial(**changes):
    return make_sae(torch.float32, l=None, **changes).eval()


def config_of(sae, **changes):
    return replace(sae.cfg, input_scale=1.0, **changes)


@pytest.mark.parametrize(
    "changes", [{}, {"input_scale": 0.3}, {"apply_b_dec_to_input": False}, {"norms": 3.0}, {"centring": True}]
)
def test_it_begins_as_the_sae_it_is_given(tmp_path, changes):
    """The same reconstructions in the units of the activations, where every positive entry is kept."""
    norms, centring = changes.pop("norms", None), changes.pop("centring", False)
    sae = initial(k=96, **changes)
    if norms:
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, norms, 96)[:, None])
    config = config_of(sae, **({"apply_b_dec_to_input": False} if centring else {}))
    trainer = Trainer(config, TRAIN, X, tmp_path / "run", init_from=sae)
    assert trainer.sae.cfg.input_scale == trainer.store.scale != sae.cfg.input_scale
    ours, theirs = trainer.sae.train()(X).x_hat, sae.train()(X).x_hat
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(96))


def test_nothing_is_rounded_where_units_and_norms_are_the_same(tmp_path):
    first = Trainer(SampledSAEConfig(d_in=D, d_sae=48, k=3), TRAIN, X, tmp_path / "first").run(progress=False)
    second = Trainer(replace(first.cfg, seed=5), TRAIN, X, tmp_path / "second", init_from=first)
    assert all(torch.equal(a, b) for a, b in zip(second.sae.parameters(), first.parameters()))
    assert same_weights(first, SampledSAE.from_pretrained(tmp_path / "first")), "what it is given stays as it is"


def test_a_resumed_run_remembers_what_it_began_with(tmp_path):
    sae = initial()
    config = config_of(sae)
    whole = Trainer(config, TRAIN, X, tmp_path / "whole", init_from=sae).run(progress=False)
    begun_training(config, TRAIN, X, tmp_path / "run", steps=1, init_from=sae)
    with pytest.raises(ValueError, match=r"init: was .* is None"):
        Trainer(config, TRAIN, X, tmp_path / "run")
    with pytest.raises(ValueError, match="other settings"):
        Trainer(config, TRAIN, X, tmp_path / "run", init_from=initial(seed=9))
    assert same_weights(Trainer(config, TRAIN, X, tmp_path / "run", init_from=sae).run(progress=False), whole)


def test_another_size_or_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="d_sae=48: init_from has 96"):
        Trainer(config_of(initial(), d_sae=48), TRAIN, X, tmp_path, init_from=initial())
    with pytest.raises(TypeError, match="init_from=str: must be a SampledSAE"):
        Trainer(config_of(initial()), TRAIN, X, tmp_path, init_from="folder")


@pytest.mark.parametrize("peer", ["ours", *formats.FORMATS])
def test_the_command_takes_a_folder_of_ours_or_a_peers(tmp_path, peer, capsys):
    torch.save(X, tmp_path / "x.pt")
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=None, groups=(16, 48))
    sae = Trainer(config, TRAIN, X, tmp_path / "ours").run(progress=False)
    folder = tmp_path / "layers.5" if peer == "sparsify" else tmp_path / peer
    if peer != "ours":
        formats.export(
            sae,
            folder,
            to=peer,
            origin=formats.Origin("a-model", layer=5),
            inference="topk" if peer == "sparsify" else "auto",
        )
    out = tmp_path / "run"
    command = ["train", str(tmp_path / "x.pt"), str(out), "--init-from", str(folder), "--steps", "1", "--lr", "0"]
    assert main([*command, "--batch-size", "64"]) == 0, capsys.readouterr().err
    found = SampledSAE.from_pretrained(out)
    assert (found.cfg.d_sae, found.cfg.k, found.cfg.l) == (48, 3, None)
    for name, ours in sae.named_parameters():
        torch.testing.assert_close(getattr(found, name), ours, rtol=1e-5, atol=1e-6)
    assert main([*command, "--batch-size", "64", "--features", "96"]) == 1
    assert "--features 96: init_from has 48" in capsys.readouterr().err.replace("d_sae=", "--features ")


def test_the_command_says_where_an_sae_is_of_another_kind(tmp_path, capsys):
    for name, x in (("x", X), ("y", X.flip(0)), ("narrow", X[:, :5])):
        torch.save(x, tmp_path / f"{name}.pt")
    kinds = {"sae": {}, "transcoder": {"d_out": D, "skip": True}, "crosscoder": {"layers": 2}}
    for kind, changes in kinds.items():
        SampledSAE(SampledSAEConfig(d_in=D, d_sae=48, k=3, **changes)).save_pretrained(tmp_path / kind)
    y = str(tmp_path / "y.pt")
    for kind, x, more, said in (
        ("sae", "x", ["--targets", y], f"has d_out=None, and .* {D}; --targets makes a transcoder"),
        ("sae", "x", ["--beside", y], "has layers=1, and .* 2; --beside makes a crosscoder"),
        ("transcoder", "x", [], f"has d_out={D}, and .* None"),
        ("transcoder", "x", ["--beside", y], f"has d_out={D}, and .* None"),
        ("crosscoder", "x", ["--targets", y], f"has d_out=None, and .* {D}"),
        ("crosscoder", "x", [], "has layers=2, and .* 1"),
        ("sae", "narrow", [], f"has d_in={D}, and .* 5"),
    ):
        places = [str(tmp_path / f"{x}.pt"), str(tmp_path / "run"), *more]
        assert main(["train", *places, "--init-from", str(tmp_path / kind), "--steps", "1"]) == 1
        assert re.search(f"--init-from {tmp_path / kind}: {said}", capsys.readouterr().err)
    export_transcoder(SampledSAE.from_pretrained(tmp_path / "transcoder"), tmp_path / "set", 0, model_name="m")
    assert main(["train", y, str(tmp_path / "run"), "--init-from", str(tmp_path / "set"), "--steps", "1"]) == 1
    assert "`sampled-sae import` takes one out of circuit-tracer's files" in capsys.readouterr().err


def test_a_finished_run_takes_more_steps(tmp_path):
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3)
    short = Trainer(config, TRAIN, X, tmp_path).run(progress=False)
    longer = Trainer(config, replace(TRAIN, steps=20), X, tmp_path)
    assert longer.step == 8
    assert all(torch.equal(a, b) for a, b in zip(longer.sae.parameters(), short.parameters()))
    assert longer.train_on(longer.feed.batch(8)) is None
    assert longer.optimizer.param_groups[0]["lr"] == replace(TRAIN, steps=20).lr_at(8)
    longer.save()
    with pytest.raises(ValueError, match=r"train: steps\): steps was 20, is 8"):
        Trainer(config, TRAIN, X, tmp_path)
    with pytest.raises(ValueError, match="steps was 20, is 30"):
        Trainer(config, replace(TRAIN, steps=30), X, tmp_path), "it has not ended"
    resumed = Trainer(config, replace(TRAIN, steps=20), X, tmp_path)
    assert resumed.step == 9
    resumed.run(progress=False)
    assert [line.count('"step"') for line in (tmp_path / METRICS).read_text().splitlines()] == [1] * 10


def test_more_steps_with_other_settings_are_refused(tmp_path):
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3)
    Trainer(config, TRAIN, X, tmp_path).run(progress=False)
    with pytest.raises(ValueError, match=r"train: lr\)"):
        Trainer(config, replace(TRAIN, steps=20, lr=1.0), X, tmp_path)
    with pytest.raises(ValueError, match="steps was 8, is 7"):
        Trainer(config, replace(TRAIN, steps=7), X, tmp_path)


def test_an_evaluation_of_the_sae_before_does_not_stay(tmp_path):
    config = SampledSAEConfig(d_in=D, d_sae=48, k=3)
    Trainer(config, TRAIN, X, tmp_path).run(progress=False)
    (tmp_path / "evaluation.json").write_text('{"fvu": 0.5}')
    Trainer(config, TRAIN, X, tmp_path).run(progress=False)
    assert (tmp_path / "evaluation.json").exists(), "it is the same SAE"
    Trainer(config, replace(TRAIN, steps=9), X, tmp_path).run(progress=False)
    assert not (tmp_path / "evaluation.json").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    sae = initial()
    with torch.no_grad():
        sae.W_dec[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"init_from: W_dec"):
        Trainer(config_of(sae), TRAIN, X, tmp_path / "run", init_from=sae)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_an_sae_is_refused(tmp_path, capsys):
    torch.save(X, tmp_path / "x.pt")
    assert main(["train", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--init-from", str(tmp_path)]) == 1
    assert f"--init-from {tmp_path}: holds no SAE of this package, nor one of saelens" in capsys.readouterr().err
