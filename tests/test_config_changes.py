"""`sae.cfg` replaced between two steps: each field is honoured by the next one, or refused."""

from dataclasses import fields, replace

import pytest
import torch
from makers import make_sae, tokens

from sampled_sae import SampledSAE, SampledSAEConfig

BEFORE = {"l": 2.0, "pool": "sample", "aux_coefficient": 0.5, "k_aux": 3, "aux_pool": 8, "dead_after": 50}
OTHER = {
    "k": 3,
    "l": None,
    "score": "entropy",
    "pool": "top",
    "pool_every": 2,
    "score_tokens": 0.5,
    "select": "token",
    "apply_b_dec_to_input": False,
    "aux_coefficient": 0.1,
    "k_aux": 1,
    "aux_pool": 2,
    "dead_after": 1000,
    "threshold_decay": 0.5,
    "row_grads": True,
    "impl": "reference",
    "seed": 9,
    "input_scale": 2.0,
    "screen": "off",
    "groups": (16, 96),
    "inference": "batch",
    "inference_pool": 5,
}
REFUSED = {"d_in": 9, "d_sae": 33, "d_out": 12, "skip": True, "output_scale": 2.0, "layers": 2}


def step(sae, seed):
    sae.zero_grad()
    out = sae(tokens(20, 12, seed=seed))
    out.loss.backward()
    return out


def test_every_field_is_one_of_these():
    assert {*OTHER, *REFUSED} == {field.name for field in fields(SampledSAEConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_the_next_step_is_that_of_an_sae_of_the_new_config(name):
    sae = make_sae(**BEFORE)
    sae.tokens_since_active[::3] = 100
    for seed in range(2):
        step(sae, seed)
    before = make_sae(**BEFORE)
    new = SampledSAE(replace(sae.cfg, **{name: OTHER[name]}), dtype=torch.float64)
    for fresh in (before, new):
        state = {**sae.state_dict(), "input_scale": fresh.state_dict()["input_scale"]}
        fresh.load_state_dict(state)
        if fresh.cfg.seed == sae.cfg.seed:
            fresh.generator.set_state(sae.generator.get_state())
    sae.cfg = new.cfg
    ours, expected, unchanged = (step(each, 2) for each in (sae, new, before))
    for part in ("loss", "mse", "aux", "x_hat"):
        torch.testing.assert_close(getattr(ours, part), getattr(expected, part))
    assert torch.equal(ours.codes.to_dense(), expected.codes.to_dense())
    torch.testing.assert_close(sae.threshold, new.threshold)
    assert bool(sae.row_grads) == (name == "row_grads")
    for one, other in zip(sae.parameters(), new.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    if name == "seed":
        assert not torch.equal(ours.codes.features, unchanged.codes.features), "drawn anew"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_weights_are_of_is_refused(name):
    sae = make_sae(**BEFORE)
    centred = {"apply_b_dec_to_input": None} if name in ("d_out", "skip") else {}
    with pytest.raises(ValueError, match=name):
        sae.cfg = replace(sae.cfg, **{name: REFUSED[name]}, **centred)
    step(sae, 0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [({"d_out": 7}, {"output_scale": 2.0}), ({"layers": 3, "d_in": 4}, {"input_scale": (1.0, 2.0, 0.5)})],
)
def test_scales_of_transcoders_and_crosscoders(kind, changes):
    sae = make_sae(**BEFORE, **kind)
    given = [tokens(20, 12), *([tokens(20, 7, seed=5)] if "d_out" in kind else [])]
    new = SampledSAE(replace(sae.cfg, **changes), dtype=torch.float64)
    scales = {name: scale for name, scale in new.state_dict().items() if name.endswith("_scale")}
    new.load_state_dict({**sae.state_dict(), **scales})
    sae.cfg = new.cfg
    torch.testing.assert_close(sae(*given).loss, new(*given).loss)
