"""Steps of RowAdam's tests, and the PyTorch calls that RowAdam replaces."""

import torch
from makers import tokens

# How the gradients reach the rows: a block of the pool, a pool entry by entry, the whole dictionary.
RULES = [{"d_sae": 128, "l": 4.0}, {"d_sae": 64, "l": 4.0}, {"l": None}, {"l": None, "select": "token"}]
# Every second feature dead at the start, so that the auxiliary loss adds parts on other features.
AUX = {"aux_coefficient": 1 / 32, "dead_after": 50}


def state_of(sae):
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def plain_step(sae, adam, clip):
    """Step 8 of docs/method.md in plain PyTorch."""
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    sae.project_decoder_grad()
    adam.step()
    sae.normalize_decoder()


def backward(sae, seed, dtype=torch.float64):
    """The loss of one batch; its gradients are in the parameters."""
    loss = sae(tokens(10, 12, seed=seed, dtype=dtype)).loss
    loss.backward()
    return loss.detach()


def assert_close(a, b, rtol=1e-9, atol=1e-11):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
