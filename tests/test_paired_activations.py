"""Transcoders trained and evaluated on pairs of activations, in Python and by the commands."""

import json

import numpy as np
import pytest
import torch
from makers import begun_training, same_weights, write_store

from sampled_sae import ActivationStore, PairedActivations, SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.training.evaluation import evaluate_activations, reconstruct_with
from sampled_sae.training.feed import Feed
from sampled_sae.training.sweep import evaluate, run_sweep

D, D_OUT, HELD_OUT = 12, 7, 150
CONFIG = SampledSAEConfig(d_in=D, d_sae=64, k=3, l=None, d_out=D_OUT, skip=True, dead_after=500)
HOW = TrainConfig(steps=60, batch_size=50, checkpoint_every=10, log_every=10, lr=1e-2)


@pytest.fixture(scope="module")
def both():
    """(x [n, D], y [n, D_OUT]): y is a linear and a rectified function of x."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(650, D, generator=g) * 3
    hidden = torch.relu(x @ torch.randn(D, 20, generator=g) - 4)
    return x, 0.05 * hidden @ torch.randn(20, D_OUT, generator=g) + 0.1 * x[:, :D_OUT] + 0.3


def test_a_batch_is_the_rows_of_both_in_their_own_scales(both):
    x, y = both
    pair = PairedActivations(x, y, holdout=HELD_OUT)
    assert (pair.d_in, pair.d_out, pair.tokens) == (D, D_OUT, [500])
    trainer_rows = {}
    for name, part, scale in (("x", x, pair.scale), ("y", y, pair.output_scale)):
        trainer_rows[name] = part[:500] * scale
        assert float(trainer_rows[name].square().sum(1).mean()) == pytest.approx(part.shape[1], rel=1e-5)
    batch = Feed(pair, 50, seed=3).batch(2)
    at = (batch.x[:, None] - trainer_rows["x"]).abs().sum(2).argmin(1)
    torch.testing.assert_close(batch.x, trainer_rows["x"][at])
    torch.testing.assert_close(batch.target, trainer_rows["y"][at])
    assert batch.variance == pytest.approx(
        float((batch.target - batch.target.mean(0)).square().sum(1).mean()), rel=1e-5
    )


def test_training_learns_saves_resumes_and_is_evaluated(both, tmp_path):
    x, y = both
    pair = PairedActivations(x, y, holdout=HELD_OUT)
    trainer = Trainer(CONFIG, HOW, pair, tmp_path / "whole")
    whole = trainer.run(progress=False)
    assert trainer.metrics[-1]["fvu"] < 0.3
    assert (whole.cfg.input_scale, whole.cfg.output_scale) == (pair.scale, pair.output_scale)
    begun_training(CONFIG, HOW, pair, tmp_path / "halves", steps=17)
    assert same_weights(whole, Trainer(CONFIG, HOW, pair, tmp_path / "halves").run(progress=False))
    saved = SampledSAE.from_pretrained(tmp_path / "whole")
    found = evaluate(saved, pair.holdout()[0], 64, None)
    torch.testing.assert_close(reconstruct_with(saved)(x), saved(x, y).x_hat)
    held_x, held_y = x[500:], y[500:]
    out = saved(held_x, held_y)
    expected = (held_y - out.x_hat).square().sum() / (held_y - held_y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-4)
    assert found == evaluate(saved, torch.cat([held_x, held_y], 1), 64, None)


def test_stores_and_tensors_give_the_same_training(both, tmp_path):
    x, y = both
    for name, part in (("x", x), ("y", y)):
        ActivationStore.write(tmp_path / name, part, holdout=HELD_OUT)
        np.save(tmp_path / f"{name}.npy", part.numpy())
    kinds = {
        "stores": PairedActivations(tmp_path / "x", tmp_path / "y"),
        "files": PairedActivations(tmp_path / "x.npy", tmp_path / "y.npy", holdout=HELD_OUT),
    }
    saes = [Trainer(CONFIG, HOW, pair, tmp_path / f"of {name}").run(progress=False) for name, pair in kinds.items()]
    assert same_weights(*saes)


def test_commands(both, tmp_path, capsys):
    x, y = both
    for name, part in (("x", x), ("y", y)):
        ActivationStore.write(tmp_path / name, part, holdout=HELD_OUT)
    places = [str(tmp_path / name) for name in ("x", "run")]
    targets = ["--targets", str(tmp_path / "y")]
    small = ["--features", "64", "--k", "3", "--steps", "60", "--batch-size", "50", "--lr", "0.01", "--quiet"]
    assert main(["train", *places, *targets, "--skip", "--groups", "16", *small]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["sae"]
    assert (config["d_out"], config["skip"], config["groups"]) == (D_OUT, True, [16, 64])
    assert main(["evaluate", places[1], places[0], *targets, "--quiet"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 < result["fvu"] < 1
    assert len(result["fvu_groups"]) == 2
    capsys.readouterr()
    for command, said in (
        (["train", *places[:1], str(tmp_path / "other"), "--skip", *small], "has no targets"),
        (["evaluate", places[1], places[0], "--quiet"], "a transcoder's targets (--targets) behind"),
        (["evaluate", places[1], places[0], *targets, "--splice-rows", "2", "--quiet"], "has no token rows"),
    ):
        assert main(command) == 1
        assert said in capsys.readouterr().err


def test_a_sweep_of_transcoders(both, tmp_path):
    pair = PairedActivations(*both, holdout=HELD_OUT)
    rows = run_sweep({"a": CONFIG}, TrainConfig(steps=5, batch_size=50), pair, tmp_path, progress=False)
    assert rows[0]["fvu"] > 0


def test_what_does_not_fit_is_named(both, tmp_path):
    x, y = both
    pair = PairedActivations(x, y, holdout=HELD_OUT)
    plain = SampledSAEConfig(d_in=D, d_sae=64, k=3)
    for config, store, said in (
        (plain, pair, r"d_out=None: .* has targets of 7"),
        (CONFIG, x, r"d_out=7: .* has no targets: PairedActivations"),
        (SampledSAEConfig(d_in=D, d_sae=64, k=3, d_out=8), pair, "d_out=8: .* has targets of 7"),
        (SampledSAEConfig(d_in=D, d_sae=64, k=3, d_out=7, output_scale=3.0), pair, r"output_scale=3\.0: the training"),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(config, HOW, store, tmp_path / "run")
    for target, holdout, said in (
        (y[:-1], None, "must have the tokens of"),
        (pair, None, "target: is a pair"),
        (y.clone().fill_(torch.nan), None, "target: x: nan at token 0"),
        (y[0], None, "target: "),
    ):
        with pytest.raises(ValueError, match=said):
            PairedActivations(x, target, holdout)
    sae = SampledSAE(CONFIG)
    sae.calibrate(x, 3)
    with pytest.raises(ValueError, match="target=None: a transcoder needs one"):
        evaluate_activations(sae, x)
    with pytest.raises(ValueError, match=r"target=tensor \(649, 7\): must be a tensor \[650, 7\]"):
        evaluate_activations(sae, x, target=y[1:])


def test_other_shards_are_refused(tmp_path):
    stores = [write_store(tmp_path / name, n) for name, n in (("x", (200, 130)), ("y", (130, 200)))]
    with pytest.raises(ValueError, match="in shards of the same sizes"):
        PairedActivations(*stores)
