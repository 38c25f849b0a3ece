"""Trainings that begin with the weights of a transcoder."""

from dataclasses import replace

import pytest
import torch
from makers import make_sae, same_weights, tokens

from sampled_sae import ActivationStore, PairedActivations, SampledSAE, SampledSAEConfig, TrainConfig, Trainer, formats
from sampled_sae.cli import main

D, D_OUT = 12, 7
TRAIN = TrainConfig(steps=8, batch_size=64, log_every=1)
X, Y = tokens(500, D, dtype=torch.float32) * 3, tokens(500, D_OUT, dtype=torch.float32, seed=2) * 0.2 + 1


def initial(**settings):
    """With decoder rows of several norms, in units of its own."""
    given = {"d_out": D_OUT, "skip": True, "l": None, "input_scale": 0.4, "output_scale": 1.7, **settings}
    sae = make_sae(torch.float32, **given)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, sae.cfg.d_sae)[:, None])
    sae.calibrate(X, 4)
    return sae.eval()


def began_with(sae, tmp_path, **changes):
    """The SAE of a training before its first step."""
    pair = PairedActivations(X, Y)
    config = replace(sae.cfg, input_scale=1.0, output_scale=1.0, **changes)
    return Trainer(config, TRAIN, pair, tmp_path / "run", init_from=sae).sae, pair


@pytest.mark.parametrize("skip", [False, True])
def test_it_reconstructs_as_before_in_units_of_its_own(tmp_path, skip):
    sae = initial(skip=skip)
    begun, pair = began_with(sae, tmp_path)
    assert (begun.cfg.input_scale, begun.cfg.output_scale) == (pair.scale, pair.output_scale) != (0.4, 1.7)
    torch.testing.assert_close(begun.W_dec.norm(dim=1), torch.ones(96))
    everything = SampledSAE(replace(sae.cfg, k=96), dtype=torch.float32)
    everything.load_state_dict(sae.state_dict())
    ours = SampledSAE(replace(begun.cfg, k=96, row_grads=False), dtype=torch.float32)
    ours.load_state_dict(begun.state_dict())
    # all positive entries are kept, whatever their units
    torch.testing.assert_close(ours.train()(X, Y).x_hat, everything.train()(X, Y).x_hat, rtol=1e-4, atol=1e-4)


def test_a_skip_may_be_begun_and_is_never_lost(tmp_path):
    begun, _ = began_with(initial(skip=False), tmp_path, skip=True)
    assert not begun.W_skip.any()
    with pytest.raises(ValueError, match="skip=False: init_from has a skip"):
        began_with(initial(), tmp_path, skip=False)
    config = SampledSAEConfig(d_in=D, d_sae=96, k=4, d_out=D_OUT)
    with pytest.raises(ValueError, match="d_out=7: init_from has None; give the training the same"):
        Trainer(config, TRAIN, PairedActivations(X, Y), tmp_path / "run", init_from=make_sae(torch.float32))


def test_by_command_of_ours_and_of_a_peer(tmp_path, capsys):
    ActivationStore.write(tmp_path / "inputs", X, holdout=80)
    ActivationStore.write(tmp_path / "outputs", Y, holdout=80)
    initial(select="token").save_pretrained(tmp_path / "ours")
    square = initial(select="token", d_out=D)
    formats.export(square, tmp_path / "peer", to="sparsify")
    how = ["--steps", "4", "--batch-size", "64", "--quiet"]
    for name, target in (("ours", "outputs"), ("peer", "inputs")):
        to = ["--targets", str(tmp_path / target), "--init-from", str(tmp_path / name), *how]
        assert main(["train", str(tmp_path / "inputs"), str(tmp_path / f"run of {name}"), *to]) == 0, (
            capsys.readouterr()
        )
        trained = SampledSAE.from_pretrained(tmp_path / f"run of {name}")
        assert (trained.cfg.skip, trained.cfg.k, trained.cfg.d_sae, trained.cfg.select) == (True, 4, 96, "token")


@pytest.mark.parametrize("skip", [False, True])
def test_a_skip_is_asked_for_by_command(tmp_path, skip, capsys):
    ActivationStore.write(tmp_path / "inputs", X, holdout=80)
    ActivationStore.write(tmp_path / "outputs", Y, holdout=80)
    initial(skip=skip).save_pretrained(tmp_path / "ours")
    places = [str(tmp_path / "inputs"), str(tmp_path / "run"), "--targets", str(tmp_path / "outputs")]
    how = ["--init-from", str(tmp_path / "ours"), "--skip", "--steps", "2", "--batch-size", "64", "--quiet"]
    assert main(["train", *places, *how]) == 0, capsys.readouterr()
    assert SampledSAE.from_pretrained(tmp_path / "run").cfg.skip


def test_a_resumed_training_knows_what_it_began_with(tmp_path):
    config = replace(initial().cfg, input_scale=1.0, output_scale=1.0)

    def trainer(name, seed=0):
        return Trainer(config, TRAIN, PairedActivations(X, Y), tmp_path / name, init_from=initial(seed=seed))

    killed = trainer("killed")
    killed.train_on(killed.feed.batch(0))
    killed.save()
    again = trainer("killed")
    assert again.step == 1
    assert same_weights(again.run(progress=False), trainer("whole").run(progress=False))
    with pytest.raises(ValueError, match="init"):
        trainer("killed", seed=3)
