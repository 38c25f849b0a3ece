"""Evaluation mode: by the threshold alone, which training moves and calibration sets."""

import copy

import pytest
import torch
from makers import RULES, TOPK, make_sae, tokens


def dense_codes(sae, x, above):
    """Evaluation as its docstring has it."""
    x = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    a = torch.relu(x @ sae.W_enc + sae.b_enc)
    return a * (a > above)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != TOPK], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_is_by_the_threshold_alone(rule, dtype):
    sae = make_sae(dtype, **rule).eval()
    x = tokens(30, 12, dtype=dtype)
    for threshold in (0.0, 0.7, 1.3):
        sae.threshold.fill_(threshold)
        expected = dense_codes(sae, x, sae.threshold)
        assert expected.any()
        torch.testing.assert_close(sae.encode(x), expected)
        together, alone = sae.encode(x), torch.cat([sae.encode(row[None]) for row in x])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(sae(x).x_hat, sae.decode(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_active_means_strictly_above_the_threshold(dtype):
    sae = make_sae(dtype).eval()
    x = tokens(8, 12, dtype=dtype)
    sae.threshold.zero_()
    a = sae.encode(x)
    for value in a[a > 0].sort().values[[0, 20, -2, -1]]:
        sae.threshold = value.detach().clone()
        assert sae.encode_sparse(x).count() == (a > value).sum()
        assert not (sae.encode(x) == value).any()


@pytest.mark.parametrize("l0", [None, 0.5, 1, 7.25, 20])
@pytest.mark.parametrize("convert", [None, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_calibration_gives_the_mean_l0_exactly(dtype, l0, convert):
    sae = make_sae(dtype).eval()
    if convert is not None:
        sae.to(convert)
    x = tokens(64, 12, dtype=convert or dtype)
    threshold = sae.calibrate(x, l0)
    assert threshold == float(sae.threshold) > 0
    assert sae.encode_sparse(x).count() == round(64 * (4 if l0 is None else l0))


def test_calibration_with_too_few_positives_keeps_them_all():
    sae = make_sae().eval()
    with torch.no_grad():
        sae.b_enc[5:] = -1000
    assert sae.calibrate(tokens(64, 12), 90) == 0
    assert sae.encode_sparse(tokens(64, 12)).count() == dense_codes(sae, tokens(64, 12), 0).count_nonzero()


def test_calibration_does_not_move_the_rest():
    sae = make_sae()
    before = copy.deepcopy(sae.state_dict())
    sae.calibrate(tokens(64, 12))
    assert sae.training
    for name, value in sae.state_dict().items():
        if name not in ("threshold", "threshold_steps", "calibrated_at"):
            assert torch.equal(value, before[name])
    assert sae.threshold_steps == sae.calibrated_at == 1


def test_threshold_is_the_running_mean_of_the_smallest_kept_activation():
    sae, expected = make_sae(threshold_decay=0.75), None
    for seed in range(4):
        smallest = sae(tokens(16, 12, seed=seed)).codes.values.min().item()
        expected = smallest if expected is None else 0.75 * expected + 0.25 * smallest
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
        assert sae.threshold_steps == seed + 1
    with torch.no_grad():
        sae.b_enc.fill_(-1000)
    assert sae(tokens(16, 12)).codes.count() == 0
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    assert sae.threshold_steps == 4
