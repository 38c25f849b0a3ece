"""Sweeps, and the metrics of the SAEs that they train."""

from dataclasses import replace

import pytest
import torch
from makers import SMALL_SAE as SAE

from sampled_sae import SampledSAE, SampledSAEConfig
from sampled_sae.training.batches import ShuffledStream
from sampled_sae.training.evaluation import evaluate_activations, features_for_share
from sampled_sae.training.sweep import run_sweep, variants
from sampled_sae.training.train_config import TrainConfig

TRAIN = TrainConfig(steps=24, batch_size=64, checkpoint_every=6, log_every=2, lr=3e-3)


def test_evaluation_metrics_by_hand():
    sae = SampledSAE(SampledSAEConfig(d_in=2, d_sae=3, k=1, l=None)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 0]]))
        sae.threshold.fill_(0.5)
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.4, 2.0], [0.0, 2.0]])
    result = evaluate_activations(sae, x, batch_size=2)
    assert result["l0"] == 1.0
    assert result["fvu"] == pytest.approx(0.16 / (x - x.mean(0)).square().sum())
    assert result["never_active"] == 1
    assert result["dead_share"] == pytest.approx(1 / 3)
    assert result["jaccard"] == pytest.approx(0.5)
    assert result["features_for_90"] == 2
    assert sum(result["frequency_histogram"]) == 2
    assert float(sae.threshold) == 0.5, "evaluation leaves the SAE as it was"
    assert not sae.training


def test_features_for_share():
    assert features_for_share(torch.tensor([1, 90, 9, 0]), 0.9) == 1
    assert features_for_share(torch.tensor([1, 89, 10, 0]), 0.9) == 2
    assert features_for_share(torch.zeros(3, dtype=torch.int64), 0.9) == 0


def test_sweep_evaluates_at_equal_l0_and_does_not_redo_what_is_done(store, tmp_path):
    configs = variants(SAE, [1.0, 2.0, None], ["l2", "entropy"], [0], topk=True)
    assert list(configs) == ["l1_l2", "l1_entropy", "l2_l2", "l2_entropy", "batchtopk", "topk"]
    said = []
    rows = run_sweep(configs, TRAIN, store, tmp_path / "s", progress=False, say=said.append)
    assert all("already" not in line for line in said)
    table = (tmp_path / "s" / "results.md").read_text()
    assert all(name in table for name in configs)
    calibrated = torch.cat([ShuffledStream(store, 64).batch(t) for t in range(7)]) / store.scale
    sae = SampledSAE.from_pretrained(tmp_path / "s" / "l2_l2")
    assert sae.encode_sparse(calibrated).l0() == pytest.approx(3.0, rel=0.15)
    again = run_sweep(configs, TRAIN, store, tmp_path / "s", progress=False, say=said.append)
    assert again == rows
    assert sum("already" in line for line in said) == 6
    with pytest.raises(ValueError, match="other settings"):
        run_sweep(configs, replace(TRAIN, lr=1.0), store, tmp_path / "s", progress=False)


def test_values_of_l_that_one_folder_would_hold():
    with pytest.raises(ValueError, match=r"ls=\[4, 4.0000001, None\]: some look alike"):
        variants(SAE, [4, 4.0000001, None], ["l2"], [0], topk=False)
    assert list(variants(SAE, [4, 4.0, None], ["l2"], [0], topk=False)) == ["l4_l2", "batchtopk"]
