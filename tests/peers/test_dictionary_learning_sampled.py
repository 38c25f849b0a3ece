"""`SampledTrainer` under `trainSAE`."""

import json

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as TheirBatchTopKSAE
from dictionary_learning.utils import load_dictionary
from dictionary_learning_makers import (
    D,
    F,
    K,
    arguments,
    batches,
    trained,
)

from sampled_sae import SampledSAE, SampledSAEConfig, formats
from sampled_sae.integrations.dictionary_learning import BatchTopKSAE, BatchTopKTrainer, SampledTrainer, TopKTrainer


def test_the_l0_that_is_logged_is_the_realised_one():
    run = SampledTrainer(**arguments(l=1.0))
    found = run.loss(batches(1)[0], logging=True)
    l0 = float((found.f != 0).float().sum(1).mean())
    assert l0 < K - 0.1
    assert run.effective_l0 == pytest.approx(l0)


@pytest.mark.parametrize("pool", ["top", "sample"])
def test_logging_moves_nothing(pool):
    """In dictionary_learning a logged batch counts twice for the threshold and for dead features."""
    data = batches(20)
    runs = [
        trained(SampledTrainer, data, dead_after=100, pool=pool, l=3.0, decay_start=None, run=run)
        for run in ({}, {"verbose": True, "log_steps": 3})
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].dead > 0
    assert all(torch.equal(a, b) for a, b in zip(*(run.ae.state_dict().values() for run in runs)))


SAMPLED = [
    {"l": 3.0},
    {"l": 3.0, "score": "entropy"},
    {"l": 8.0},
    {"l": 3.0, "pool_every": 3, "adam": "decayed"},
    {"l": 3.0, "score_tokens": 0.5, "moments": torch.bfloat16},
    {"l": 3.0, "select": "token"},
    {"l": 3.0, "pool": "sample"},
    {"l": None},
]


@pytest.mark.parametrize("rule", SAMPLED, ids=str)
def test_sampled_trainer(rule, tmp_path):
    data = batches(40, B=200)
    ours = trained(SampledTrainer, data, tmp_path, **rule)
    loaded, config = load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    assert type(loaded) is TheirBatchTopKSAE
    said = config["trainer"]["sampled_sae"]
    assert {k: said[k] for k in rule if k != "moments"} == {k: v for k, v in rule.items() if k != "moments"}
    assert said["moments"] == str(rule.get("moments", torch.float32))
    torch.testing.assert_close(ours.ae(data[0]), loaded(data[0]), rtol=1e-5, atol=1e-5)
    if rule["l"] is not None:
        l0 = (loaded.encode(data[-1]) > 0).float().sum(1).mean()
        assert float(l0) == pytest.approx(K, abs=0.01)


@pytest.mark.parametrize("rule", [{"l": 1.0}, {"l": 2.0}, {"l": 2.0, "select": "token"}], ids=str)
def test_a_checkpoint_keeps_about_k_features_a_token(rule, tmp_path):
    """`trainSAE` saves before the step, so none of its checkpoints sees the calibration of the last one."""
    data = batches(60, B=200)
    run = {"save_steps": [12, 50]}
    trained(SampledTrainer, data, tmp_path, run=run, threshold_beta=0.9, threshold_every=3, **rule)
    for step in run["save_steps"]:
        loaded = TheirBatchTopKSAE.from_pretrained(tmp_path / "trainer_0" / "checkpoints" / f"ae_{step}.pt")
        l0 = (loaded.encode(data[step]) > 0).float().sum(1).mean()
        assert float(l0) == pytest.approx(K, rel=0.3), step


@pytest.mark.parametrize(
    "rule", [{"l": 3.0, "score": "entropy", "aux_pool": 7}, {"l": 2.0, "select": "token"}], ids=str
)
def test_the_rule_of_the_pool_is_read_back(rule, tmp_path):
    trained(SampledTrainer, batches(15), tmp_path, auxk_alpha=0.5, threshold_beta=0.75, **rule)
    cfg = formats.load(tmp_path / "trainer_0").cfg
    expected = {"l": 3.0, "score": "l2", "select": "batch", "aux_pool": 1024, "seed": 7, **rule}
    expected |= {"aux_coefficient": 0.5, "threshold_decay": 0.75}
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_sampled_trainer_without_a_pool_is_topk_or_batchtopk():
    for select, trainer in (("batch", BatchTopKTrainer), ("token", TopKTrainer)):
        data = batches(20)
        exact = trained(trainer, data, dead_after=200)
        sampled = trained(SampledTrainer, data, dead_after=200, l=None, select=select, aux_pool=None)
        assert exact.losses == sampled.losses
        assert type(sampled.ae) is type(exact.ae)
        assert sampled.config["trainer_class"] == exact.config["trainer_class"]


def test_sampled_trainer_s_loss_is_the_reference_s():
    x = batches(1, B=64)[0]
    run = SampledTrainer(**arguments(l=3.0, score="entropy"))
    cfg = SampledSAEConfig(d_in=D, d_sae=F, k=K, l=3.0, score="entropy", impl="reference")
    reference = SampledSAE(cfg)
    weights = dict(run.ae.sae.named_parameters())
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(weights[name])
    assert run.loss(x, step=0).item() == pytest.approx(reference(x).loss.item(), rel=1e-6)


@pytest.mark.parametrize("pooled", [True, False])
def test_the_bounded_aux_loss_takes_the_dead_features_of_highest_score(pooled):
    x = batches(1, B=64)[0]
    run = SampledTrainer(**arguments(l=3.0 if pooled else None, aux_pool=20))
    run.num_tokens_since_fired[::2] = 10**9
    found = run.loss(x, logging=True)
    dead = (torch.arange(F) % 2 == 0) & ~found.f.bool().any(0)
    assert int(run.dead_features) == int(dead.sum()) > 40
    sae, e = run.ae.sae, found.x - found.x_hat
    a = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    best = torch.where(dead, a.norm(dim=0), -1).topk(20).indices
    kept = torch.zeros_like(a)
    kept[:, best] = a[:, best]
    kept = torch.where(kept >= kept.topk(D // 2).values[:, -1:], kept, 0)
    missed = (e - kept @ sae.W_dec).square().sum(1).mean()
    expected = missed / (e - e.mean(0)).square().sum(1).mean()
    assert found.losses["auxk_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert float(run.pre_norm_auxk_loss) == pytest.approx(
        float((e - kept @ sae.W_dec).square().sum(1).mean()), rel=1e-5
    )


def test_loading_weights_ends_a_kept_pool():
    run = SampledTrainer(**arguments(l=3.0, pool_every=100))
    other = BatchTopKSAE(D, F, K)
    x = batches(1)[0]
    run.loss(x)
    run.ae.load_state_dict(other.state_dict())
    assert float(run.loss(x).detach()) == run.loss(x, logging=True).losses["loss"], "found afresh"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="threshold_every=0"):
        SampledTrainer(**arguments(threshold_every=0))


def test_how_adam_is_run():
    run = SampledTrainer(**arguments(adam="lazy", moments=torch.bfloat16))
    run.update(0, batches(1)[0])
    assert run.optimizer.mode == "lazy"
    assert run.optimizer.state[run.ae.sae.W_enc]["exp_avg"].dtype == torch.bfloat16


def test_config_travels_as_json():
    run = SampledTrainer(**arguments(moments=torch.bfloat16))
    assert json.loads(json.dumps(run.config)) == run.config
