"""Metrics on known features against loops and against sae_lens; the data that they are measured on."""

import itertools

import numpy as np
import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import compute_classification_metrics, feature_uniqueness, mean_correlation_coefficient

from benchmarks.ground_truth import metrics
from benchmarks.ground_truth.absorption import Absorption
from benchmarks.ground_truth.metrics import Batch
from benchmarks.ground_truth.synthetic import Synthetic
from sampled_sae import SampledSAE, SampledSAEConfig, SparseCodes

F, N, D, B = 5, 7, 4, 40


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_codes(seed):
    """Codes [B, F] whose first feature never fires, and firing [B, N] whose first true feature never does."""
    codes, firing = drawn(seed, B, F).clamp(min=0), drawn(seed + 1, B, N) > 0.4
    codes[:, 0], firing[:, 0] = 0, False
    return codes, firing


@pytest.mark.parametrize("shape", [(F, N), (N, F), (F, F), (1, N)])
def test_mcc_is_the_best_assignment_of_all(shape):
    decoder, truth = drawn(0, shape[0], D), drawn(1, shape[1], D)
    cosine = metrics.cosines(decoder, truth)
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        by_hand = abs(float(decoder[i] @ truth[j])) / float(decoder[i].norm() * truth[j].norm())
        assert float(cosine[i, j]) == pytest.approx(by_hand, abs=1e-6)
    small, large = sorted(shape)
    tall = cosine if shape[0] == small else cosine.t()
    best = max(
        np.mean([float(tall[i, j]) for i, j in enumerate(p)]) for p in itertools.permutations(range(large), small)
    )
    assert metrics.mean_correlation(cosine) == pytest.approx(best, abs=1e-6)
    assert metrics.mean_correlation(cosine) == pytest.approx(mean_correlation_coefficient(decoder, truth), abs=1e-6)


def test_ties_go_to_the_lower_feature_and_a_row_of_zeros_matches_nothing_better():
    truth = torch.eye(3)
    decoder = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    found, matches = metrics.of_decoder(decoder, truth)
    assert matches.tolist() == [0, 2, 0]
    assert found["uniqueness"] == pytest.approx(2 / 3)
    assert found["mcc"] == pytest.approx((0.5**0.5 + 1 + 0) / 3)


def test_uniqueness_is_that_of_sae_lens():
    decoder, truth = drawn(2, 30, D), drawn(3, N, D)
    found, matches = metrics.of_decoder(decoder, truth)
    assert found["uniqueness"] == pytest.approx(feature_uniqueness(decoder, truth))
    assert found["uniqueness"] == len(set(matches.tolist())) / 30


@pytest.mark.parametrize("seed", range(4))
def test_detection_counts_what_loops_count(seed):
    codes, firing = some_codes(seed)
    decoder, truth = drawn(seed + 2, F, D), drawn(seed + 3, N, D)
    _, matches = metrics.of_decoder(decoder, truth)
    if seed == 0:
        matches[1] = 0  # stands for the true feature that never fires
    detection = metrics.Detection(matches)
    for part in range(0, B, 16):
        at = slice(part, part + 16)
        detection.add(SparseCodes.from_dense(codes[at]), firing[at])
    found = detection.result()
    each = []
    for j in range(F):
        active, true = codes[:, j] > 0, firing[:, matches[j]]
        hits = sum(bool(a and t) for a, t in zip(active, true, strict=True))
        precision = hits / int(active.sum()) if active.any() else 0.0
        recall = hits / int(true.sum()) if true.any() else 0.0
        each.append((precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0))
    for name, values in zip(("precision", "recall", "f1"), zip(*each, strict=True), strict=True):
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6)
    assert found["found"] == len({int(j) for j, (*_, f1) in zip(matches, each, strict=True) if f1 > 0.5})
    assert found["l0"] == pytest.approx(float((codes > 0).sum()) / B)
    assert found["dead"] == sum(not bool((codes[:, j] > 0).any()) for j in range(F)) >= 1
    if seed:
        theirs = compute_classification_metrics(codes, firing.float(), decoder, truth)
        assert found["f1"] == pytest.approx(theirs.f1_score, abs=1e-6)
        assert found["precision"] == pytest.approx(theirs.precision, abs=1e-6)
        assert found["recall"] == pytest.approx(theirs.recall, abs=1e-6)


def test_r2_over_batches_is_that_of_all_tokens():
    x = drawn(4, B, D) + 3
    x_hat = x + 0.3 * drawn(5, B, D)
    ours, theirs = metrics.Explained(), ExplainedVarianceCalculator()
    for part in (slice(0, 7), slice(7, B)):
        ours.add(x[part], x_hat[part])
        theirs.add_batch(x_hat[part], x[part])
    a, b = x.double().numpy(), x_hat.double().numpy()
    expected = 1 - ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert ours.result() == pytest.approx(expected)
    assert ours.result() == pytest.approx(theirs.compute(), abs=1e-5)
    perfect = metrics.Explained()
    perfect.add(x, x)
    assert perfect.result() == 1


@pytest.mark.parametrize("inference", ["threshold", "pool", "batch"])
def test_an_sae_is_measured_under_its_inference(inference):
    x, firing = drawn(6, B, D), drawn(7, B, N) > 0
    sae = SampledSAE(SampledSAEConfig(D, F, 2, l=1.0, inference=inference, inference_pool=3, input_scale=2.0)).eval()
    sae.calibrate(x)
    matches = torch.tensor([6, 0, 3, 3, 1])
    found = metrics.of_codes(sae, [Batch(x, firing)], matches)
    detection, explained = metrics.Detection(matches), metrics.Explained()
    detection.add(SparseCodes.from_dense(sae.encode(x).detach()), firing)
    explained.add(x, sae(x).x_hat.detach())
    assert found == pytest.approx({**detection.result(), "r2": explained.result()}, abs=1e-6)


def test_an_sae_of_the_true_features_finds_them():
    """Orthogonal features of one size, one SAE feature each: everything is right."""
    truth = torch.eye(6)
    firing = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    x = firing.float()
    sae = SampledSAE(SampledSAEConfig(6, 6, float(firing.float().sum(1).mean()), l=None))
    with torch.no_grad():
        sae.W_dec.copy_(truth)
        sae.W_enc.copy_(truth)
    sae.eval().calibrate(x, l0=1.0)
    sae.threshold.fill_(0.5)
    found, matches = metrics.of_decoder(sae.W_dec, truth)
    codes = metrics.of_codes(sae, [Batch(x, firing)], matches)
    assert found == {"mcc": 1, "uniqueness": 1}
    assert codes == pytest.approx(
        {"precision": 1, "recall": 1, "f1": 1, "l0": sae.cfg.k, "dead": 0, "found": 6, "r2": 1}
    )


@pytest.fixture(scope="module")
def tiny():
    return Synthetic("tiny")


def test_samples_depend_on_their_seed_alone(tiny):
    state = torch.get_rng_state()
    one, again, other = (torch.cat([b.x for b in tiny.batches(5000, seed)]) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (5000, 48)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[:4096], next(tiny.batches(4096, 1)).x)


def test_activations_are_made_of_the_true_features_that_fire(tiny):
    """Subtracting what the firing features span leaves nothing but the bias, which is the same for all."""
    x, firing = tiny.evaluation(64)[0]
    bias = tiny.model.feature_dict.bias.detach()
    for token, fires in zip(x[:20], firing[:20], strict=True):
        basis = tiny.truth[fires]
        rest = token - bias
        if len(basis):
            rest = rest - torch.linalg.lstsq(basis.t(), rest[:, None]).solution[:, 0] @ basis
        assert float(rest.norm()) < 1e-4 * (1 + float(token.norm()))


def test_held_out_tokens_are_in_batches_of_the_size_asked_for(tiny):
    parts = tiny.evaluation(512)
    assert [len(x) for x, _ in parts] == [512] * 4
    assert all(firing.dtype == torch.bool and firing.shape == (512, 256) for _, firing in parts)
    assert not torch.equal(parts[0].x, tiny.calibration()[:512])


def test_absorption_counts_silent_parents_whose_child_speaks():
    """Feature 0 is the parent of 1 and 2; the SAE stands for 0 twice, for 1 and for 3."""
    cosine = torch.tensor([[0.9, 0, 0, 0], [0.7, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 0.8]])
    matches = cosine.argmax(1)
    firing = torch.tensor([[1, 0, 0, 0]] * 4 + [[1, 1, 0, 0]] * 4 + [[1, 0, 1, 0]] * 2).bool()
    # alone the parent is heard three times of four; beside its first child once, and then the child is silent once
    heard = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 0])
    child = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    dense = torch.stack((heard, 1 - heard, child, torch.zeros(10)), 1).float()
    made = Absorption({0: [1, 2], 3: [1]}, matches, cosine)
    for part in (slice(0, 5), slice(5, 10)):
        made.add(SparseCodes.from_dense(dense[part]), firing[part])
    # of six tokens with a child two are absorbed; feature 3 never fires
    assert made.result() == {"absorbed": pytest.approx(2 / 6), "parents": 1}
    none = Absorption({2: [1]}, matches, cosine)
    none.add(SparseCodes.from_dense(dense), firing)
    assert none.result() == {"absorbed": None, "parents": 0}


def test_every_parent_fires_with_its_children():
    synthetic = Synthetic("tiny")
    firing = torch.cat([batch.firing for batch in synthetic.batches(4096, 1)])
    assert len(synthetic.children) > 10
    for parent, children in synthetic.children.items():
        assert not (firing[:, children].any(1) & ~firing[:, parent]).any()
