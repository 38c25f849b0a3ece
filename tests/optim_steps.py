"""Steps of RowAdam and of the calls it stands for."""

import torch
from makers import state_of, tokens

from sampled_sae import reference

# Path of the gradients by rule: a block of the pool, a pool entry by entry, the whole dictionary.
RULES = [{"d_sae": 128, "l": 4.0}, {"d_sae": 64, "l": 4.0}, {"l": None}, {"l": None, "select": "token"}]
# Every second feature dead at the start, so that the auxiliary loss adds parts on other features.
AUX = {"aux_coefficient": 1 / 32, "dead_after": 50}


def plain_step(sae, adam, clip):
    """Step 8 by torch's own parts; in float64 the specification must come to the same."""
    expected = specified_step(sae, adam, clip) if sae.W_dec.dtype == torch.float64 else None
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    sae.project_decoder_grad()
    adam.step()
    sae.normalize_decoder()
    if expected is not None:
        assert_close(state_of(sae), expected)


def specified_step(sae, adam, clip):
    """The weights after `reference.update` from adam's settings and moments; the SAE and adam stay as they are."""
    weights = state_of(sae)
    names = {p: name for name, p in sae.named_parameters()}
    for group in adam.param_groups:
        assert clip is None or len(group["params"]) == len(names), "the norm is that of all gradients"
        grads, moments, step = {}, {}, 1
        for p in group["params"]:
            if p.grad is not None:
                grads[names[p]] = p.grad.clone()
            if p in adam.state:
                moments[names[p]] = adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"]
                step = int(adam.state[p]["step"]) + 1
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        reference.update(weights, grads, moments, step, clip=clip, layers=sae.cfg.layers, **settings)
    return weights


def backward(sae, seed, dtype=torch.float64):
    loss = sae(tokens(10, 12, seed=seed, dtype=dtype)).loss
    loss.backward()
    return loss.detach()


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
