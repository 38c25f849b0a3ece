"""Steps 7 and 8 of the specification: gradients in closed form against autograd; the update by hand.

Tests of RowAdam hold `reference.update` to torch's own Adam as they go (optim_steps.py).
"""

import pytest
import torch
from makers import leaves, problem

from sampled_sae import reference as ref

RULES = [{"l": 2.0}, {"l": None}, {"l": None, "select": "token"}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_are_autograds(rule, centred, scaled):
    t = leaves(problem(12, 7, 30))
    scale = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5 if scaled else None
    x_in = t["x"] - t["b_dec"] if centred else t["x"]
    c = ref.sampled_topk(x_in, t["W_enc"], t["b_enc"], k=4, scale=scale, **rule)
    x_hat = ref.decode(c, t["W_dec"], t["b_dec"])
    ref.reconstruction_loss(t["x"], x_hat).backward()
    plain = [v.detach() for v in (t["x"], x_hat, x_in, c, t["W_enc"], t["W_dec"])]
    found = ref.gradients(*plain, centred=centred, scale=scale)
    for name, grad in found.items():
        torch.testing.assert_close(grad, t[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_first_update_moves_every_weight_by_lr_and_keeps_rows_at_unit_norm():
    weights = {"b_enc": torch.zeros(2, dtype=torch.float64), "W_dec": torch.eye(2, dtype=torch.float64)}
    grads = {"b_enc": torch.tensor([3.0, -4.0]).double(), "W_dec": torch.tensor([[7.0, 2.0], [0.0, 5.0]]).double()}
    ref.update(weights, grads, {}, 1, lr=0.5, eps=1e-30, clip=None)
    # Adam's first step is lr times the gradient's sign; the parallel part of the first row is gone before it
    torch.testing.assert_close(weights["b_enc"], torch.tensor([-0.5, 0.5]).double())
    torch.testing.assert_close(weights["W_dec"][0], torch.tensor([1.0, -0.5]).double() / 1.25**0.5)


def test_clipping_is_by_the_norm_of_all_gradients():
    grads = {"b_enc": torch.tensor([3.0]).double(), "b_dec": torch.tensor([4.0]).double()}
    weights = {name: torch.zeros(1, dtype=torch.float64) for name in grads}
    moments = {}
    ref.update(weights, grads, moments, 1, lr=1.0, clip=1.0)
    assert float(moments["b_enc"][0]) == pytest.approx(0.1 * 3 / 5, rel=1e-6)
    assert float(moments["b_dec"][1]) == pytest.approx(0.001 * (4 / 5) ** 2, rel=1e-6)
