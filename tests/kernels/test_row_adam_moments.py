"""16-bit moments, rounded up or down at random."""

import math

import pytest
import torch

pytest.importorskip("triton")

from row_adam_steps import RULE, ours, start

from sampled_sae.kernels.row_adam import row_adam_

pytestmark = pytest.mark.usefixtures("poisoned")


def rounded_once(d, seed, step, device):
    """0.999 as both moments, in bf16: two neighbours of it, as 0 (below) or 1 (above)."""
    weight, exp_avg, exp_avg_sq, _ = start(64, d, device, torch.bfloat16)
    exp_avg += 1
    exp_avg_sq += 1
    rule = RULE | {"beta1": 0.999, "beta2": 0.999, "seed": seed}
    at = torch.tensor(float(step), device=device)
    row_adam_(weight, exp_avg, exp_avg_sq, torch.zeros_like(weight), None, at, mode="dense", **rule)
    below = 1 - 2**-8
    for moment in (exp_avg, exp_avg_sq):
        assert ((moment == 1) | (moment == below)).all()
    return (exp_avg == 1).double(), (exp_avg_sq == 1).double()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("d", [None, 2, 12])
def test_bf16_moments_are_unbiased(d, device):
    """Over seeds and rows, for each column: which is which word of the random numbers."""
    above = torch.stack([torch.stack(rounded_once(d, seed, 3, device)) for seed in range(15)])
    n = 15 * 64
    share = (0.999 - (1 - 2**-8)) * 2**8
    sigma = math.sqrt(share * (1 - share) / n)
    assert ((above.mean(dim=(0, 2)) - share).abs() < 5 * sigma).all()
    # no two columns or moments are rounded alike
    columns = above.transpose(1, 2).reshape(n, -1) - share
    alike = columns.t() @ columns / n / (share * (1 - share)) - torch.eye(columns.shape[1], device=device)
    assert (alike.abs() < 5 / math.sqrt(n)).all()


def test_bf16_moments_depend_on_seed_and_step(device):
    first = rounded_once(12, 0, 3, device)[0]
    assert torch.equal(rounded_once(12, 0, 3, device)[0], first)
    assert not torch.equal(rounded_once(12, 1, 3, device)[0], first)
    assert not torch.equal(rounded_once(12, 2**32, 3, device)[0], first)
    assert not torch.equal(rounded_once(12, 0, 4, device)[0], first)


def test_bf16_moments_follow_a_slow_decay(device):
    """0.999 a step is less than half of bf16's last place: rounded to nearest, they would never move."""
    state = start(16, 4, device, torch.bfloat16)
    state[2] += 1
    found = ours(state, [(None, torch.zeros(16, 4, device=device))] * 100, "dense")[2]
    assert abs(found.double().mean() / 0.999**100 - 1) < 0.01
