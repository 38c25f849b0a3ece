"""Training on several layers or models side by side, and measuring what comes of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import make_sae, same_weights, tokens, write_store

from sampled_sae import ActivationStore, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.evaluation import evaluate_activations, reconstruct_with
from sampled_sae.training.joined_activations import PairedActivations, StackedActivations
from sampled_sae.training.layer_spread import LayerSpread, layer_cosines, layer_names, layer_shares, plot_layers
from sampled_sae.training.same_settings import identity, is_same_kind
from sampled_sae.training.sweep import evaluate

CONFIG = SampledSAEConfig(d_in=5, d_sae=64, k=3, l=None, layers=3, dead_after=500)
HOW = TrainConfig(steps=20, batch_size=40, checkpoint_every=8, log_every=5)


def layers(n=600):
    """Three layers of correlated tokens, each of its own size."""
    hidden = torch.rand(n, 20, generator=torch.Generator().manual_seed(1)).pow(8)
    return [hidden @ tokens(20, 5, dtype=torch.float32, seed=i) * 10.0**i + i for i in range(3)]


@pytest.fixture
def stack():
    return StackedActivations(layers(), holdout=150)


def test_layers_stand_side_by_side(stack, tmp_path):
    x = layers()
    assert (stack.layers, stack.d_in, stack.width_in, stack.d_out) == (3, 5, 15, None)
    assert stack.tokens == [450]
    assert torch.equal(stack.first(7), torch.cat(x, dim=1)[:7])
    assert torch.equal(stack.holdout()[0], torch.cat(x, dim=1)[450:])
    for part, scale in zip(x, stack.scale):
        assert (part[:450] * scale).square().sum(1).mean() == pytest.approx(5)
    scaled = stack.first(450) * stack.row_scale
    assert scaled.view(-1, 3, 5).square().sum(2).mean(0).tolist() == pytest.approx([5.0] * 3)
    batch = ShuffledStream(stack, 40).batch(0)
    at = torch.cdist(batch[:1], scaled).argmin()
    torch.testing.assert_close(batch[0], scaled[at])
    for name, part in zip("abc", x):
        np.save(tmp_path / f"{name}.npy", part.numpy())
    of_files = StackedActivations([str(tmp_path / f"{name}.npy") for name in "abc"], holdout=150)
    assert torch.equal(of_files.first(450), stack.first(450))
    assert of_files.where.count(" beside ") == 2


def test_what_belongs_together_is_said(tmp_path):
    stores = [write_store(tmp_path / str(i), model="made", layer=i, seed=i) for i in range(2)]
    stack = StackedActivations(stores)
    assert (stack.manifest["model"], stack.manifest["layer"]) == ("made", "0, 1")
    assert [about["layer"] for about in stack.manifest["layers"]] == [0, 1]
    other = write_store(tmp_path / "other", model="tuned", seed=2)
    assert StackedActivations([stores[0], other]).manifest["model"] == "made, tuned"
    assert StackedActivations([stores[0], other]).manifest["layer"] == 0
    json.dumps(stack.manifest)


def test_places_in_a_block_are_told_apart(tmp_path):
    sides = ("in", "out")
    stores = [
        write_store(tmp_path / side, layer=None, point=f"model.layers.3.mlp:{side}", max_norm=1.0) for side in sides
    ]
    both, reversed_ = StackedActivations(stores), StackedActivations(stores[::-1])
    assert both.manifest["point"] == "model.layers.3.mlp:in, model.layers.3.mlp:out"
    assert layer_names(both.manifest, 2) == ["model.layers.3.mlp:in", "model.layers.3.mlp:out"]
    assert not is_same_kind(identity(both.manifest), identity(reversed_.manifest))


def test_what_does_not_belong_together_is_refused(tmp_path):
    a, b, c = layers()
    for given, error, said in (
        ([a], ValueError, "layers: 1 given"),
        (a, TypeError, "layers=Tensor"),
        ("abc", TypeError, "layers=str"),
        ([a, b[:, :4]], ValueError, r"layers\[1\]=.*has width 4, must have that of .*, 5"),
        ([a, b[:500]], ValueError, r"layers\[1\]=.*must have the tokens of.*500 in 1 shards and 600 in 1 shards"),
        ([PairedActivations(a, b), c], ValueError, r"layers\[0\]=.*is a pair or a stack"),
        ([StackedActivations([a, b]), c], ValueError, r"layers\[0\]=.*is a pair or a stack"),
        ([a, 5], TypeError, r"layers\[1\]: store=int"),
        ([a, b, c * torch.nan], ValueError, r"layers\[2\]: x: nan at token 0"),
        ([a, b, a.clone()], ValueError, r"layers\[2\]=.*: is there twice"),
        ([a, a.double().numpy()], ValueError, r"layers\[1\]=.*: is there twice"),
    ):
        with pytest.raises(error, match=said):
            StackedActivations(given)
    stores = [write_store(tmp_path / str(i), n_holdout=150 + i) for i in range(2)]
    with pytest.raises(ValueError, match="held out 151 and 150"):
        StackedActivations(stores)
    with pytest.raises(ValueError, match=r"layers\[2\]=.*0: is there twice"):
        StackedActivations([stores[0], write_store(tmp_path / "2"), stores[0]])
    with pytest.raises(ValueError, match=r"layers\[0\].*has settled what it holds out|holdout=5: is for a tensor"):
        StackedActivations(stores, holdout=5)
    with pytest.raises(ValueError, match="x: is a stack of 2 layers"):
        PairedActivations(StackedActivations([a, b]), c)


def test_a_training_learns_each_layer_and_resumes(stack, tmp_path):
    whole = Trainer(CONFIG, replace(HOW, steps=150, lr=1e-2), stack, tmp_path / "whole").run(progress=False)
    assert whole.cfg.input_scale == stack.scale
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < lines[-1][f"fvu_layer_{i}"] < lines[0][f"fvu_layer_{i}"] for i in range(3))
    assert lines[-1]["fvu"] == pytest.approx(sum(lines[-1][f"fvu_layer_{i}"] for i in range(3)) / 3, rel=0.3)
    torch.testing.assert_close(whole.layer_norms().sum(1), torch.ones(64))
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert run["activations"]["scale"] == list(stack.scale)
    assert SampledSAE.from_pretrained(tmp_path / "whole").cfg == whole.cfg

    once = Trainer(CONFIG, HOW, stack, tmp_path / "once").run(progress=False)
    trainer = Trainer(CONFIG, HOW, stack, tmp_path / "halves")
    for i in range(9):
        trainer.train_on(trainer.feed.batch(i))
    trainer.save()
    halves = Trainer(CONFIG, HOW, StackedActivations(layers(), 150), tmp_path / "halves").run(progress=False)
    assert same_weights(once, halves)
    with pytest.raises(ValueError, match="made with other settings"):
        Trainer(CONFIG, HOW, StackedActivations(layers()[::-1], 150), tmp_path / "halves")


def test_what_does_not_fit_is_refused(stack, tmp_path, store):
    for config, activations, said in (
        (CONFIG, layers()[0], "layers=3: .* has 1; StackedActivations"),
        (replace(CONFIG, layers=1), stack, "layers=1: .* has 3"),
        (replace(CONFIG, d_in=15), stack, "d_in=15: the activations in .* have 5"),
        (replace(CONFIG, layers=1, d_out=5), stack, "d_out=5: .* has no targets"),
        (replace(CONFIG, input_scale=2.0), stack, r"input_scale=2.0: the training multiplies .* by \("),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(config, HOW, activations, tmp_path / "run")
    assert ActivationStore.open(store.folder).layers == 1


def test_metrics_by_hand():
    sae = make_sae(d_in=4, layers=3, input_scale=(0.5, 2.0, 1.0))
    x = tokens(60, 3, 4) * torch.tensor([2.0, 0.5, 1.0])[:, None].double()
    sae.calibrate(x, 4)
    result = evaluate_activations(sae, x)
    assert result == evaluate_activations(sae, x.flatten(1))
    scale = torch.tensor(sae.cfg.input_scale).double()[:, None]
    x_hat = sae.eval()(x).x_hat
    errors, deviations = ((t * scale).square().sum((0, 2)) for t in (x - x_hat, x - x.mean(0)))
    assert result["fvu_layers"] == pytest.approx((errors / deviations).tolist())
    assert result["fvu"] == pytest.approx(float(errors.sum() / deviations.sum()))
    assert "fvu_layers" not in evaluate_activations(_calibrated(make_sae(), x), x.flatten(1))
    with pytest.raises(ValueError, match=r"\[60, 11\].*must be \[n, 12\], the 3 layers of a crosscoder"):
        evaluate(sae, x.flatten(1)[:, 1:], 20, None)
    spliced = reconstruct_with(sae)
    assert spliced.kind == "a crosscoder"
    assert torch.equal(spliced(x), sae.decode(sae.encode_sparse(x)))


def _calibrated(sae, x):
    sae.calibrate(x.flatten(1), 4)
    return sae


@pytest.mark.parametrize("scales", [(1.0, 1.0), ((0.5, 2.0, 1.0), (1.0, 1.0, 4.0)), (3.0, (0.5, 2.0, 1.0))], ids=str)
def test_a_training_begins_with_another_crosscoder(tmp_path, scales):
    initial = make_sae(torch.float32, d_in=5, d_sae=64, layers=3, input_scale=scales[0], k=3)
    stack = StackedActivations(layers())
    trainer = Trainer(CONFIG, replace(HOW, steps=1, lr=1e-9), stack, tmp_path / "run", init_from=initial)
    sae, x = trainer.sae, torch.stack(layers(), 1)
    torch.testing.assert_close(sae.layer_norms().sum(1), torch.ones(64))
    # what is active, whatever the threshold, reconstructs the same
    for each in (sae, initial):
        each.threshold.zero_()
        each.eval()
    torch.testing.assert_close(
        sae.decode(sae.encode_sparse(x)), initial.decode(initial.encode_sparse(x)), rtol=1e-3, atol=1e-2
    )
    with pytest.raises(ValueError, match="layers=3: init_from has 1"):
        Trainer(CONFIG, HOW, stack, tmp_path / "other", init_from=make_sae(torch.float32, d_in=5, d_sae=64))


def test_by_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for i in range(3):
        write_store(tmp_path / f"a{i}", layer=i, seed=i)
    first, *others = (str(tmp_path / f"a{i}") for i in range(3))
    run, plot = str(tmp_path / "run"), tmp_path / "run" / "layers.png"
    small = ["--features", "64", "--k", "3", "--steps", "8", "--batch-size", "40", "--quiet"]
    assert main(["train", first, run, "--beside", *others, *small, "--l", "none"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(result["fvu_layers"]) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["activations"]["layer"] == "0, 1, 2"
    assert plot.stat().st_size > 1000
    plot.unlink()
    capsys.readouterr()
    assert main(["evaluate", run, first, "--beside", *others, "--splice-rows", "0"]) == 0
    said = capsys.readouterr().out
    assert "fvu_layers: [" in said
    assert str(plot) in said
    assert plot.exists()
    for name in "pq":  # which nothing but their scales tells apart
        ActivationStore.write(tmp_path / name, (3 if name == "p" else 1) * layers()[0], holdout=100, source="made")
    p, q = str(tmp_path / "p"), str(tmp_path / "q")
    assert main(["train", p, str(tmp_path / "pq"), "--beside", q, *small]) == 0
    assert main(["evaluate", str(tmp_path / "pq"), q, "--beside", p]) == 1
    assert "was trained on these layers in another order" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "pq"), q, "--beside", p, "--insist"]) == 0
    sweep = ["sweep", first, str(tmp_path / "s"), "--beside", *others, "--ls", "1,none", "--scores", "l2", "--no-topk"]
    assert main([*sweep, *small, "--splice-rows", "0"]) == 0
    capsys.readouterr()
    for argv, said in (
        (["evaluate", run, first], "layers=3, but .* has 1; --beside names"),
        (["evaluate", run, first, "--beside", others[0]], "layers=3, but .* has 2"),
        (["evaluate", run, others[0], "--beside", first, others[1]], "was trained on layer 0, 1, 2 of made"),
        (["evaluate", run, first, "--beside", *others, "--splice-rows", "9"], "must be from 0 to 3, the held-out"),
        (["train", first, run + "x", "--beside", *others, "--targets", first, *small], "--beside .*of a crosscoder"),
    ):
        assert main(argv) == 1, argv
        assert re.search(said, capsys.readouterr().err), argv


def test_names_that_tell_layers_apart():
    def names(**said):
        return layer_names({"layers": [{name: value[i] for name, value in said.items()} for i in range(2)]}, 2)

    assert names(layer=[3, 5], model=["m", "m"]) == ["layer 3", "layer 5"]
    assert names(layer=[3, 3], model=["org/base", "org/tuned"]) == ["base", "tuned"]
    assert names(layer=[None] * 2, model=[None] * 2, source=["/a/x.npy", "/a/y.npy"]) == ["x.npy", "y.npy"]
    assert names(layer=[None] * 2, source=["", ""]) == layer_names({}, 2) == ["0", "1"]


@pytest.mark.parametrize("n_layers", [2, 3])
def test_the_plot_of_the_layers(tmp_path, n_layers):
    pytest.importorskip("matplotlib")
    sae = make_sae(d_in=6, layers=n_layers)
    shares = layer_shares(sae)
    torch.testing.assert_close(shares.sum(1), torch.ones(96, dtype=torch.float64))
    W = sae.W_dec.detach().view(96, n_layers, 6)
    expected = (W[5, 0] @ W[5, 1]) / W[5, 0].norm() / W[5, 1].norm()
    assert float(layer_cosines(sae, 0, 1)[5]) == pytest.approx(float(expected), rel=1e-5)
    sae.tokens_since_active[:40] = sae.cfg.dead_after
    spread = LayerSpread.of(sae)
    assert spread.shares.shape == (56, n_layers)
    path = plot_layers(spread, tmp_path, ["a $ b", "c", "d"][:n_layers])
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="layers=1: is an SAE of one layer"):
        layer_shares(make_sae())
    with pytest.raises(ValueError, match="b=7: must be below"):
        layer_cosines(sae, 0, 7)
