"""k and l that change while training, and a config that is changed by hand."""

import json
from dataclasses import replace

import pytest
import torch
from makers import D, begun_training, same_weights, tokens

from sampled_sae import SampledSAE, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.cli import main
from sampled_sae.impl.hints import Rule, ThresholdHints
from sampled_sae.training.sweep import run_sweep
from sampled_sae.training.train_config import config_at
from sampled_sae.training.training_run import METRICS

SAE = SampledSAEConfig(d_in=D, d_sae=48, k=3, l=2.0)
TRAIN = TrainConfig(
    steps=20, batch_size=32, checkpoint_every=6, log_every=1, k_start=8, l_start=6, schedule_steps=10, lr=3e-3
)
X = 2 * tokens(320, D, dtype=torch.float32, seed=3) + 1


def rule_at(step, config=SAE, **changes):
    found = config_at(config, replace(TRAIN, **changes), step)
    return found.k, found.l


def test_k_and_l_go_linearly_to_those_of_the_sae():
    assert [rule_at(t) for t in (0, 5, 9)] == [(8, 6), (5.5, 4), (pytest.approx(3.5), pytest.approx(2.4))]
    assert config_at(SAE, TRAIN, 10) is config_at(SAE, TRAIN, 19) is SAE
    assert rule_at(5, l_start=None) == (5.5, 2)
    assert rule_at(5, k_start=None) == (3, 4)
    assert rule_at(5, k_start=1) == (2, 4), "up too"
    assert rule_at(0, replace(SAE, l=None), l_start=None) == (8, None)


def test_each_token_keeps_a_whole_number_and_a_kept_pool_has_one_rule():
    by_token = replace(SAE, select="token")
    assert [rule_at(t, by_token)[0] for t in range(11)] == [8, 8, 7, 6, 6, 6, 5, 4, 4, 4, 3]
    kept = replace(SAE, pool_every=4)
    assert [rule_at(t, kept) for t in (0, 3, 4)] == [(8, 6), (8, 6), (6, pytest.approx(4.4))]


def test_steps_take_the_k_and_l_of_the_schedule(tmp_path):
    trainer = Trainer(SAE, TRAIN, X, tmp_path)
    sizes = []
    forward = trainer.sae.forward
    trainer.sae.forward = lambda *a, **k: sizes.append(trainer.sae.cfg.pool_size) or forward(*a, **k)
    sae = trainer.run(progress=False)
    assert sizes[:3] == [48, 42, 37]  # ceil(8 * 6), ceil(7.5 * 5.6), ceil(7 * 5.2)
    assert sizes[10:] == [6] * 10
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["k"], line["l"]) for line in lines[:2]] == [(8, 6), (7.5, pytest.approx(5.6))]
    assert lines[0]["l0"] == 8, "the whole budget of the step"
    assert lines[15]["l0"] <= 3
    assert (sae.cfg.k, sae.cfg.l) == (3, 2)
    assert SampledSAE.from_pretrained(tmp_path).cfg == replace(SAE, input_scale=trainer.store.scale)


@pytest.mark.parametrize("changes", [{}, {"pool_every": 4}, {"select": "token"}, {"pool": "sample", "pool_every": 3}])
def test_a_run_that_is_resumed_within_the_schedule_is_the_same(tmp_path, changes):
    config = replace(SAE, **changes)
    whole = Trainer(config, TRAIN, X, tmp_path / "whole").run(progress=False)
    begun_training(config, TRAIN, X, tmp_path / "run", steps=6)
    resumed = Trainer(config, TRAIN, X, tmp_path / "run")
    assert resumed.step == 6
    assert same_weights(resumed.run(progress=False), whole)
    with pytest.raises(ValueError, match="k_start was 8, is 9"):
        Trainer(config, replace(TRAIN, k_start=9), X, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule_steps": None}, "schedule_steps=None: must be given with k_start and l_start"),
        ({"k_start": None, "l_start": None}, "schedule_steps=10: needs k_start or l_start"),
        ({"schedule_steps": 21}, "schedule_steps=21: must be at most 20"),
        ({"schedule_steps": 0}, "schedule_steps=0: must be"),
        ({"k_start": 0}, "k_start=0: must be a finite number > 0"),
        ({"k_start": float("nan")}, "k_start=nan: must be"),
        ({"l_start": 0.5}, "l_start=0.5: must be"),
    ],
)
def test_schedules_that_are_none_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(TRAIN, **changes)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({"l": None}, {}, "l_start=6: an SAE without an l"),
        ({}, {"k_start": 49}, r"k_start=49: must be in \(0, 48\]"),
        ({"select": "token"}, {"k_start": 7.5}, "k_start=7.5: select='token' keeps a whole number"),
    ],
)
def test_schedules_that_an_sae_cannot_follow_are_refused(tmp_path, config, changes, said):
    config, train = replace(SAE, **config), replace(TRAIN, **changes)
    with pytest.raises(ValueError, match=said):
        Trainer(config, train, X, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"configs\['one'\]: {said}"):
        run_sweep({"one": config}, train, X, tmp_path / "sweep")
    assert not (tmp_path / "run").exists()


def test_a_config_changed_by_hand_is_refused_and_nothing_is_lost(tmp_path):
    trainer = Trainer(SAE, replace(TRAIN, steps=10), X, tmp_path)
    trainer.train_on(trainer.feed.batch(0))
    trainer.sae.cfg = replace(trainer.sae.cfg, k=1, score="entropy")
    with pytest.raises(ValueError, match=r"changed in mid-training \(k was 8.0, is 1; score was 'l2', is 'entropy'\)"):
        trainer.train_on(trainer.feed.batch(1))
    trainer.sae.cfg = config_at(trainer.target, trainer.config, 0)
    trainer.train_on(trainer.feed.batch(1))
    assert trainer.step == 2


def test_a_checkpoint_of_before_schedules_goes_on(tmp_path):
    train = replace(TRAIN, k_start=None, l_start=None, schedule_steps=None)
    begun_training(SAE, train, X, tmp_path, steps=1)
    state = torch.load(tmp_path / "checkpoint.pt")
    for name in ("k_start", "l_start", "schedule_steps"):
        del state["settings"]["train"][name]
    del state["settings"]["init"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert Trainer(SAE, train, X, tmp_path).step == 1


def test_a_hint_serves_a_k_near_by():
    hints = ThresholdHints()
    hints.keep(Rule(30.0), None, 0.5)
    hints.keep(Rule(33.0), None, 0.4)
    assert hints.of(Rule(34.0), None) == 0.4
    assert hints.of(Rule(29.0), None) == 0.5
    assert hints.of(Rule(60.0), None) is None
    assert hints.of(Rule(30.0, "token"), None) is None
    assert hints.of(Rule(30.0), torch.arange(3)) is None


def test_hints_of_earlier_checkpoints():
    """Tensors stood there as such, and no word said that they are ones."""
    hints = ThresholdHints()
    hints.load_state_dict([(30.0, "batch", True, torch.tensor([0.5])), (30.0, "token", True, 0.25)], "cpu")
    found = hints.of(Rule(30.0), None)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor([0.5]))
    assert hints.of(Rule(30.0, "token"), None) == 0.25
    again = ThresholdHints()
    again.load_state_dict(hints.state_dict(), "cpu")
    assert torch.equal(again.of(Rule(30.0), None), found)
    assert again.state_dict() == hints.state_dict()


def test_the_command_takes_a_schedule(tmp_path, capsys):
    torch.save(X, tmp_path / "x.pt")
    command = ["train", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--features", "48", "--k", "3", "--steps", "6"]
    command += ["--batch-size", "32", "--k-start", "6", "--schedule-steps", "4"]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["k_start"] == 6
    assert main([*command, "--l", "none", "--l-start", "3"]) == 1
    assert "--l-start 3.0: an SAE without an l" in capsys.readouterr().err
